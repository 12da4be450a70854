"""The page served on this machine while training goes on. It reads the runs and changes nothing."""

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
from cagsr.run_page.read_run import Run, find_run, labels, read_run
from cagsr.run_page.run_html import Content, content_of, render_page
from cagsr.runs.folder import CONFIG, is_being_written
from cagsr.support.localhost import HOST

SHARE = 10
"""After a reading that took a second the next one waits this many: training must not lose its cores to its page."""


class LivePage:
    """The newest content of some runs, which need not be there yet; collected again only when files or states change."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._labels = labels(paths)
        self._lock = threading.Lock()
        self._seen: tuple[list[Any], list[Any]] = ([], [])
        self._newest: tuple[list[Run], Content, str] | None = None
        self._rest_until = 0.0

    def newest(self) -> tuple[list[Run], Content, str]:
        """The runs, what the page shows of them, and a version that changes with it; raises RunError as ``read_run``."""
        with self._lock:
            folders = [find_run(path, wait=True) for path in self._paths]
            states, files = _fingerprint(folders)
            changed = files != self._seen[1] and time.monotonic() >= self._rest_until
            if self._newest is None or states != self._seen[0] or changed:
                began = time.monotonic()
                runs = [read_run(run, label) for run, label in zip(folders, self._labels, strict=True)]
                content = content_of(runs)
                parts = [content.data[name] for name in ("points", "runs", "answers")]
                text = json.dumps([parts, content.html], sort_keys=True)
                version = hashlib.sha256(text.encode()).hexdigest()[:16]
                self._newest, self._seen = (runs, content, version), (states, files)
                self._rest_until = time.monotonic() + SHARE * (time.monotonic() - began)
            return self._newest


def _fingerprint(runs: Sequence[Path]) -> tuple[list[Any], list[Any]]:
    """Who holds the locks and what is there, and sizes and times of the files that are read: cheap to ask for."""
    states, files = [], []
    for run in runs:
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
