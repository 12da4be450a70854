"""The page's server: Starlette on 127.0.0.1, every rating in the database before it is confirmed."""

import socket
import sqlite3
from dataclasses import asdict
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from cagsr.errors import DataError
from cagsr.html_page import fill, page_file
from cagsr.rating.guard import Guard, cookie_name
from cagsr.rating.store import Progress, Store
from cagsr.support.localhost import HOST

LARGEST = 16_384
"""Bytes of a message from the page; the largest that it sends has some hundred."""


class _Message(BaseModel):
    """What every message says; with no more than that somebody gives a name."""

    model_config = ConfigDict(extra="forbid", strict=True)
    database: str
    """Which ratings file the page was opened for."""
    rater: Annotated[str, Field(min_length=1, max_length=400)]


Mark = Annotated[int, Field(ge=1, le=5)]


class RateMessage(_Message):
    """A rating, with an id that the page made up, so that a repeated message is known as one."""

    question: Annotated[str, Field(max_length=64)]
    choice: Literal["left", "right", "tie", "both_bad", "skip"]
    client_id: Annotated[str, Field(min_length=8, max_length=64)]
    marks: dict[Literal["left", "right"], dict[str, Mark]] | None = None


class UndoMessage(_Message):
    """The latest rating is to be taken back."""

    client_id: Annotated[str, Field(min_length=8, max_length=64)]


MessageT = TypeVar("MessageT", bound=_Message)


def rating_app(store: Store, port: int) -> Starlette:
    """Make the ASGI application for one ratings file.

    Writes answer with where the rater stands, so that the page needs no second request. Status 409: another rating stands
    there; 412: the page was opened for another file; 503: the disk refused, nothing was kept.
    """
    page = fill("rating", "page.html.jinja", database=store.database, scales=store.settings.scales)

    async def show(request: Request) -> Response:
        response = HTMLResponse(page)
        response.set_cookie(cookie_name(port), store.token, httponly=True, samesite="strict", path="/")
        return response

    async def state(request: Request) -> Response:
        _check_database(store, request.query_params.get("database", ""))
        found = await run_in_threadpool(store.progress, request.query_params.get("rater", ""))
        if found is None:
            raise HTTPException(404, "Nobody of that name rates here yet.")
        return _progress(found)

    async def join(request: Request) -> Response:
        message = await _read(request, _Message, store)
        return _progress(await run_in_threadpool(store.join, message.rater))

    async def rate(request: Request) -> Response:
        message = await _read(request, RateMessage, store)
        marks = None if message.choice == "skip" else message.marks
        scales = store.settings.scales
        by_side = [set((message.marks or {}).get(side, {})) for side in ("left", "right")]
        if message.choice != "skip" and (scales or marks is not None) and by_side != [set(scales)] * 2:
            raise HTTPException(400, f"Both answers need marks for: {', '.join(scales) or 'no scales'}.")
        given = (message.rater, message.question, message.choice, message.client_id, marks)
        return await _answer(await run_in_threadpool(store.rate, *given), message)

    async def undo(request: Request) -> Response:
        message = await _read(request, UndoMessage, store)
        return await _answer(await run_in_threadpool(store.undo, message.rater, message.client_id), message)

    async def _answer(outcome: str, message: _Message) -> Response:
        found = await run_in_threadpool(store.progress, message.rater)
        if outcome == "unknown" or found is None:
            raise HTTPException(404, "No such rater or question in this ratings file.")
        return _progress(found, outcome, 409 if outcome == "conflict" else 200)

    return Starlette(
        routes=[
            Route("/", show),
            Route("/rate.js", lambda request: Response(page_file("rating", "rate.js"), media_type="text/javascript")),
            Route("/rate.css", lambda request: Response(page_file("rating", "rate.css"), media_type="text/css")),
            Route("/api/state", state),
            Route("/api/rater", join, methods=["POST"]),
            Route("/api/rate", rate, methods=["POST"]),
            Route("/api/undo", undo, methods=["POST"]),
        ],
        middleware=[Middleware(Guard, token=store.token, port=port)],
        exception_handlers={
            DataError: lambda request, error: JSONResponse({"error": str(error)}, 400),
            HTTPException: lambda request, error: JSONResponse({"error": error.detail}, error.status_code),
            sqlite3.Error: lambda request, error: JSONResponse({"error": f"The ratings file refuses: {error}."}, 503),
        },
    )


def link(store: Store, taken: socket.socket) -> str:
    """Give the address of the page, token included."""
    return f"http://{HOST}:{taken.getsockname()[1]}/?token={store.token}"


async def _read(request: Request, kind: type[MessageT], store: Store) -> MessageT:
    """Read and check the page's message."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "A message must be JSON.")
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > LARGEST:
            raise HTTPException(413, "The message is too long.")
    try:
        message = kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise HTTPException(400, f"{'.'.join(map(str, first['loc'])) or 'The message'}: {first['msg']}.") from None
    _check_database(store, message.database)
    return message


def _check_database(store: Store, named: str) -> None:
    if named != store.database:
        raise HTTPException(412, "This page was opened for another ratings file than the one served here now.")


def _progress(progress: Progress, outcome: str = "done", status: int = 200) -> Response:
    return JSONResponse({"outcome": outcome, **asdict(progress)}, status)
