"""A port of this machine only, for the pages that are served."""

import errno
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.requests import Request
from starlette.types import ASGIApp

from cagsr.errors import ConfigError
from cagsr.support.progress import resting

HOST = "127.0.0.1"


def listen(port: int) -> socket.socket:
    """Take the port on 127.0.0.1 (0: a free one), else ConfigError. A browser that is too early waits, and isn't refused."""
    taken = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((HOST, port))
        taken.listen(128)
    except OSError as error:
        taken.close()
        why = "is taken by another program" if error.errno == errno.EADDRINUSE else f"can't be used ({error.strerror})"
        raise ConfigError(f"--port {port}: {why}; give another one, or 0 for any that is free.") from None
    return taken


def own_host(request: Request, port: int) -> str | None:
    """The address that a request names as its host, if it is this machine's own with our port; None: it is another one, as a
    foreign name that was made to point here (DNS rebinding).
    """
    hosts = [one.lower() for one in request.headers.getlist("host")]
    return hosts[0] if hosts in ([f"{HOST}:{port}"], [f"localhost:{port}"]) else None


def serve_until_interrupted(application: ASGIApp, taken: socket.socket, ready: Callable[[], None]) -> None:
    """Serve an application on the port of ``listen`` until Ctrl-C.

    ``ready`` is called once the server listens to Ctrl-C too: one that comes before can be lost in an import.
    """

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

    # No access log: its lines would show a token.
    quiet: dict[str, Any] = {
        "log_level": "warning",
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
    }
    settings = uvicorn.Config(application, **quiet, lifespan="off", ws="none", timeout_graceful_shutdown=3)
    with resting():
        Server(settings).run(sockets=[taken])
