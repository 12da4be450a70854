"""The page served on this machine while training goes on. It reads the runs and changes nothing."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from cagsr.errors import CagsrError
from cagsr.run_page.find_run import find_run, labels
from cagsr.run_page.read_run import Run, read_run
from cagsr.run_page.run_html import Content, content_of, render_page
from cagsr.runs.folder import CONFIG, is_being_written
from cagsr.support.localhost import HOST

SHARE = 10
"""After a reading that took a second the next one waits this many: training must not lose its cores to its page."""


class LivePage:
    """The newest content of some runs, collected again only when their files or states have changed.

    Args:
        paths: the runs as the user named them; they need not be there yet.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._labels = labels(paths)
        self._lock = threading.Lock()
        self._states: list[Any] = []
        self._files: list[Any] = []
        self._runs: list[Run] = []
        self._content: Content | None = None
        self._version = ""
        self._rest_until = 0.0

    def newest(self) -> tuple[list[Run], Content, str]:
        """The runs, what the page shows of them, and a version that changes with it.

        Raises:
            RunError: a run that can't be read.
        """
        with self._lock:
            states, files = self._fingerprint()
            fresh = self._content is None or states != self._states or (files != self._files and self._rested())
            if fresh or self._content is None:
                began = time.monotonic()
                runs = [read_run(run, label) for run, label in zip(self._folders(), self._labels, strict=True)]
                self._content = content_of(runs)
                parts = [self._content.data[name] for name in ("points", "runs", "answers")]
                text = json.dumps([parts, self._content.html], sort_keys=True)
                self._version = hashlib.sha256(text.encode()).hexdigest()[:16]
                self._runs, self._states, self._files = runs, states, files
                self._rest_until = time.monotonic() + SHARE * (time.monotonic() - began)
            return self._runs, self._content, self._version

    def _rested(self) -> bool:
        return time.monotonic() >= self._rest_until

    def _folders(self) -> list[Path]:
        return [find_run(path, wait=True) for path in self._paths]

    def _fingerprint(self) -> tuple[list[Any], list[Any]]:
        """Who holds the locks and what is there, and sizes and times of the files that are read: cheap to ask for."""
        states, files = [], []
        for run in self._folders():
            states.append((run, run.exists(), (run / "final" / "config.json").exists(), is_being_written(run)))
            found = [file.stat() for file in (run / CONFIG, *sorted(run.glob("*.jsonl"))) if file.exists()]
            files.append([(stat.st_size, stat.st_mtime_ns) for stat in found])
        return states, files


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
