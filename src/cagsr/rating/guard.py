"""Who may talk to the page's server: whoever has the token, from this machine's own address, from the page itself."""

from __future__ import annotations

import hmac

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    # Only the page's own files; no inline script, no plug-in, no frame, nothing from elsewhere.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""On every response."""

READS = frozenset({"GET", "HEAD"})


class Guard:
    """Middleware that turns away every request but the page's own.

    - Host must be this machine's address with our port. A foreign name that was made to point here (DNS rebinding) is not.
    - The token must come in the link that was printed (on the page itself only), in the cookie that the page then sets, or in
      the header ``X-Cagsr-Token``. It is compared in constant time.
    - What writes must name our own address as its Origin: another page open in the same browser can't.
    """

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self._app = app
        self._token = token.encode()
        self._hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        self._cookie = cookie_name(port)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, with our headers on the answer, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no web sockets here; the server then refuses the handshake

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self._refusal(scope)
        await (self._app if refusal is None else refusal)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        request = HTTPConnection(scope)
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            return PlainTextResponse("This address is not the one that cagsr rate serve printed.\n", 421)
        if not any(hmac.compare_digest(one.encode(), self._token) for one in self._tokens(request)):
            sentence = "Open the link that cagsr rate serve printed: it holds the token that this page asks for."
            if scope["path"].startswith("/api/"):
                return JSONResponse({"error": sentence}, 403)
            return PlainTextResponse(sentence + "\n", 403)
        if scope["method"] not in READS:
            own = request.headers.getlist("origin") == [f"http://{hosts[0].lower()}"]
            if not own or request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
                return JSONResponse({"error": "Ratings are taken from the rating page alone."}, 403)
        return None

    def _tokens(self, request: HTTPConnection) -> list[str]:
        """Every token that the request brings."""
        found = request.headers.getlist("x-cagsr-token")
        found += [value for name, value in request.cookies.items() if name == self._cookie]
        if request.scope["path"] == "/" and request.scope["method"] in READS:
            found += request.query_params.getlist("token")
        return found


def cookie_name(port: int) -> str:
    """Cookies know no ports: each port's page has a name of its own."""
    return f"cagsr_rate_{port}"
