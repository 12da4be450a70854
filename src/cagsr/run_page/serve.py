"""The page served on this machine while training goes on. It reads the runs and changes nothing."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from cagsr.errors import CagsrError, ConfigError
from cagsr.run_page.locate import find_run, labels
from cagsr.run_page.page import Content, content_of, render_page
from cagsr.run_page.read import Run, read_run

HOST = "127.0.0.1"


class LivePage:
    """The newest content of some runs, collected again only when their files or states have changed.

    Args:
        paths: the runs as the user named them; they need not be there yet.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._labels = labels(paths)
        self._lock = threading.Lock()
        self._seen: Any = None
        self._runs: list[Run] = []
        self._content: Content | None = None
        self._version = ""

    def newest(self) -> tuple[list[Run], Content, str]:
        """The runs, what the page shows of them, and a version that changes with it.

        Raises:
            RunError: a run that can't be read.
        """
        with self._lock:
            seen = self._fingerprint()
            if seen != self._seen or self._content is None:
                runs = [read_run(find_run(path, wait=True), label) for path, label in self._runs_named()]
                content = content_of(runs)
                text = json.dumps([content.data["points"], content.data["runs"], content.html], sort_keys=True)
                self._version = hashlib.sha256(text.encode()).hexdigest()[:16]
                self._runs, self._content, self._seen = runs, content, seen
            return self._runs, self._content, self._version

    def _runs_named(self) -> list[tuple[Path, str]]:
        return list(zip(self._paths, self._labels, strict=True))

    def _fingerprint(self) -> Any:
        """Sizes and times of the files that are read, and who holds the locks: cheap to ask for."""
        from cagsr.runs.folder import is_being_written

        found = []
        for path in self._paths:
            run = find_run(path, wait=True)
            files = [run / "config.yaml", run / "final" / "config.json", *sorted(run.glob("*.jsonl"))]
            stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
            found.append((str(run), run.exists(), is_being_written(run), stats))
        return found


def application(paths: Sequence[Path]) -> Starlette:
    """The web application: ``/`` the page, ``/news.json`` what has changed, ``/page.html`` the page as one file.

    Only requests that name this machine as their host are answered, so that no other site can read it by way of a
    name of its own that points here.
    """
    live = LivePage(paths)

    def page(request: Request) -> Response:
        runs, content, version = live.newest()
        return HTMLResponse(render_page(runs, content, live=version), headers={"Cache-Control": "no-store"})

    def saved(request: Request) -> Response:
        runs, content, _ = live.newest()
        return HTMLResponse(render_page(runs, content))

    def news(request: Request) -> Response:
        try:
            _, content, version = live.newest()
        except CagsrError as error:
            return JSONResponse({"error": str(error), "now": time.time()})
        if request.query_params.get("have") == version:
            return JSONResponse({"version": version, "now": time.time()})
        return JSONResponse({"version": version, "now": time.time(), "data": content.data, "html": content.html})

    def refused(request: Request, error: Exception) -> Response:
        return Response(str(error), status_code=500, media_type="text/plain")

    return Starlette(
        routes=[Route("/", page), Route("/page.html", saved), Route("/news.json", news)],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"], www_redirect=False)],
        exception_handlers={CagsrError: refused},
    )


def open_socket(port: int) -> socket.socket:
    """Take a port of this machine only; 0 takes a free one.

    Raises:
        ConfigError: the port is taken or can't be used.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port}: must lie between 0 (a free one) and 65535.")
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((HOST, port))
    except OSError as error:
        bound.close()
        raise ConfigError(f"--port {port}: can't be used ({error.strerror}); --port 0 takes a free one.") from error
    return bound


def serve(paths: Sequence[Path], bound: socket.socket) -> None:
    """Serve until interrupted."""
    server = uvicorn.Server(uvicorn.Config(application(paths), log_level="warning", access_log=False))
    server.run(sockets=[bound])
