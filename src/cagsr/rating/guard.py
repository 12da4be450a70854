"""Who may talk to the page's server: whoever has the token, from this machine's own address, from the page itself."""

import hmac

from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

from cagsr.support.localhost import own_host

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


class Guard(BaseHTTPMiddleware):
    """Middleware that turns away every request but the page's own, and puts our headers on every answer.

    - Host must be this machine's address with our port.
    - The token must come in the link that was printed (on the page itself only), in the cookie that the page then sets, or in
      the header ``X-Cagsr-Token``. It is compared in constant time.
    - What writes must name our own address as its Origin: another page open in the same browser can't.
    """

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        super().__init__(app)
        self._token, self._port = token.encode(), port
        self._cookie = cookie_name(port)

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        """Let the request through, or refuse it."""
        response = self._refusal(request) or await call_next(request)
        response.headers.update(HEADERS)
        return response

    def _refusal(self, request: Request) -> Response | None:
        host, path = own_host(request, self._port), request.scope["path"]
        if host is None:
            return PlainTextResponse("This address is not the one that cagsr rate serve printed.\n", 421)
        if not any(hmac.compare_digest(one.encode(), self._token) for one in self._tokens(request, path)):
            sentence = "Open the link that cagsr rate serve printed: it holds the token that this page asks for."
            if path.startswith("/api/"):
                return JSONResponse({"error": sentence}, 403)
            return PlainTextResponse(sentence + "\n", 403)
        if request.method not in READS:
            own = request.headers.getlist("origin") == [f"http://{host}"]
            if not own or request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
                return JSONResponse({"error": "Ratings are taken from the rating page alone."}, 403)
        return None

    def _tokens(self, request: Request, path: str) -> list[str]:
        """Every token that the request brings."""
        found = request.headers.getlist("x-cagsr-token")
        found += [value for name, value in request.cookies.items() if name == self._cookie]
        return found + (request.query_params.getlist("token") if path == "/" and request.method in READS else [])


def cookie_name(port: int) -> str:
    """Cookies know no ports: each port's page has a name of its own."""
    return f"cagsr_rate_{port}"
