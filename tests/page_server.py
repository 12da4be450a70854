"""The pages' servers as functions that a process of its own runs (tests/apart.py)."""

from __future__ import annotations

import socket
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from cagsr.rating.server import rating_app
from cagsr.rating.store import Store
from cagsr.run_page.live_page import application
from cagsr.support.localhost import listen


def serve_ratings(path: Path) -> None:
    """Serve a ratings file until killed."""
    taken = listen(0)
    _serve(rating_app(Store(path), taken.getsockname()[1]), taken)


def serve_runs(*folders: Path) -> None:
    """Serve the page of some runs until killed."""
    _serve(application(folders), listen(0))


def _serve(what: Starlette, taken: socket.socket) -> None:
    print(f"http://127.0.0.1:{taken.getsockname()[1]}/", flush=True)  # who comes before it serves waits
    uvicorn.Server(uvicorn.Config(what, log_level="warning", lifespan="off", ws="none")).run(sockets=[taken])
