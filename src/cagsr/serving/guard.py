"""Who may talk to the server: whoever has the token, under this machine's own address, and no page of another origin."""

import hmac
import json
import sys
import traceback
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cagsr.serving.protocol import ApiError
from cagsr.support.localhost import own_host

HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"cross-origin-resource-policy": b"same-origin",
    b"cache-control": b"no-store",
}
"""On every response."""


class Guard:
    """ASGI middleware around everything: turns strangers away, and says of an error of ours where it is, never what was sent.

    - Host must be this machine's address with our port.
    - The token must come as ``Authorization: Bearer``; it is compared in constant time.
    - A request that names an origin comes from a page in a browser: only one of our own address could be meant.
    """

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self._app, self._token, self._port = app, token.encode(), port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] != "http":
            return
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message["headers"], *HEADERS.items()]
            await send(message)

        try:
            if (refusal := self._refusal(Request(scope))) is not None:
                return await answer_error(sending, refusal)
            await self._app(scope, receive, sending)
        except ClientDisconnect:
            return  # nobody reads an answer
        except Exception as error:  # whatever it is, its text may quote a prompt: nobody else may print it
            print(f"cagsr serve: {where(error)}", file=sys.stderr, flush=True)
            if not begun:
                await answer_error(sending, ApiError(500, f"The server failed ({type(error).__name__})."))

    def _refusal(self, request: Request) -> ApiError | None:
        host = own_host(request, self._port)
        if host is None:
            return ApiError(421, "This address is not the one that cagsr serve printed.")
        origins = request.headers.getlist("origin")
        foreign = any(one != f"http://{host}" for one in origins)
        if foreign or request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return ApiError(403, "Pages of other origins may not talk to this server.")
        given = request.headers.getlist("authorization")
        scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), self._token):
            return ApiError(
                401, "Give the token of the server's folder as Authorization: Bearer TOKEN.", code="invalid_api_key"
            )
        return None


async def answer_error(send: Send, error: ApiError) -> None:
    """Send an error's body."""
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def where(error: BaseException) -> str:
    """What kind of error it is and where it was raised: its text may hold a prompt, so it is not said."""
    frames: Any = traceback.extract_tb(error.__traceback__)[-3:]
    return f"{type(error).__name__} at " + " > ".join(f"{one.filename}:{one.lineno}" for one in frames)
