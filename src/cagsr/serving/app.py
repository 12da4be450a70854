"""The server's addresses: OpenAI's, and those under /cagsr for what is kept, learned and rolled back."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from cagsr.errors import CagsrError
from cagsr.serving import protocol
from cagsr.serving.activity import Activity
from cagsr.serving.asking import Reader
from cagsr.serving.engine import Answered, Asked, Busy, Engine, Event, Job
from cagsr.serving.guard import Guard, where
from cagsr.serving.prompt_store import PromptStore
from cagsr.serving.protocol import ApiError, ChatRequest, CompletionRequest, Feedback, chunk_choice, usage
from cagsr.serving.settings import ServeConfig
from cagsr.serving.versions import Versions, list_versions
from cagsr.serving.writing import Piece

CONSENT = "x-cagsr-consent"
LISTED = 1000
"""Most prompts in one listing."""


@dataclass
class Server:
    """What the addresses work with."""

    config: ServeConfig
    engine: Engine
    store: PromptStore
    versions: Versions
    reader: Reader
    status: Callable[[], Mapping[str, Any]]
    """What the learner says of itself."""
    activity: Activity = field(default_factory=Activity)
    # Reading a prompt takes time, and tokenizers are not made for several threads.
    _reading: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "cagsr-reader"))

    def application(self, token: str, port: int) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/cagsr/status", self.tell_status),
            Route("/cagsr/versions", self.tell_versions),
            Route("/cagsr/rollback", self.roll_back, methods=["POST"]),
            Route("/cagsr/prompts", self.prompts),
            Route("/cagsr/prompts/{number:int}", self.remove, methods=["DELETE"]),
            Route("/cagsr/feedback", self.feedback, methods=["POST"]),
        ]
        told: dict[Any, Any] = {
            ApiError: lambda request, error: JSONResponse(error.body(), error.status),
            CagsrError: lambda request, error: JSONResponse(ApiError(503, str(error)).body(), 503),
            HTTPException: lambda request, error: JSONResponse(_unknown(error).body(), error.status_code),
        }
        return Starlette(routes=routes, middleware=[Middleware(Guard, token=token, port=port)], exception_handlers=told)

    # ---- models ----

    async def models(self, request: Request) -> Response:
        """All versions that can be asked for."""
        manifest, name = self.versions.manifest(), self.config.served_name
        cards = [
            protocol.model_card(name, 0, number, number == manifest.current) for number in reversed(manifest.served())
        ]
        return JSONResponse({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        """One of them."""
        number, current = self._version(request.path_params["name"]), self.versions.manifest().current
        return JSONResponse(protocol.model_card(self.config.served_name, 0, number, number == current))

    def _version(self, named: str) -> int:
        """The version that a model's name asks for; ApiError where there is none."""
        name, manifest = self.config.served_name, self.versions.manifest()
        if named == name:
            return manifest.current
        found = re.fullmatch(re.escape(name) + r"@(0|[1-9][0-9]{0,8})", named)
        if found is None or int(found[1]) not in manifest.served():
            raise ApiError(
                404,
                f"There is no such model here; ask for {name}, or for one of its versions (GET /v1/models).",
                param="model",
                code="model_not_found",
            )
        return int(found[1])

    # ---- answers ----

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        with self.activity:
            asked: ChatRequest = protocol.parsed(ChatRequest, await self._body(request))
            if asked.max_tokens is not None and asked.max_completion_tokens is not None:
                raise ApiError(400, "Give max_tokens or max_completion_tokens, not both.", param="max_tokens")
            longest = asked.max_completion_tokens or asked.max_tokens
            return await self._answer(request, asked, longest, asked.cagsr.best_of, chat=True)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        with self.activity:
            asked: CompletionRequest = protocol.parsed(CompletionRequest, await self._body(request))
            if asked.best_of is not None and asked.cagsr.best_of is not None:
                raise ApiError(400, "best_of: it is there twice; leave it out of cagsr.", param="best_of")
            return await self._answer(
                request, asked, asked.max_tokens, asked.best_of or asked.cagsr.best_of, chat=False
            )

    async def _answer(
        self,
        request: Request,
        given: ChatRequest | CompletionRequest,
        longest: int | None,
        best_of: int | None,
        *,
        chat: bool,
    ) -> Response:
        version, limits = self._version(given.model), self.config.limits
        count = given.n or 1
        sampled = best_of or count
        if sampled < count:
            raise ApiError(400, f"best_of: {sampled} is fewer than n, {count}.", param="best_of")
        if sampled > limits.answers:
            raise ApiError(
                400, f"{sampled} answers are more than the {limits.answers} that may be asked for.", param="n"
            )
        if given.stream and sampled > count:
            raise ApiError(400, "best_of: answers that are compared can't be streamed.", param="best_of")
        if given.stream_options is not None and not given.stream:
            raise ApiError(400, "stream_options: give stream: true with it.", param="stream_options")
        text, top, stop = given.prompt_text(), given.top(), given.stops()
        judged = given.cagsr.reward or sampled > count
        prompt, room = await asyncio.get_running_loop().run_in_executor(
            self._reading, self.reader.read, text, version if judged else None, longest
        )
        asked = Asked(
            prompt,
            version,
            count,
            sampled,
            1.0 if given.temperature is None else given.temperature,
            1.0 if given.top_p is None else given.top_p,
            room,
            stop,
            secrets.randbelow(2**62) if given.seed is None else given.seed,
            top,
            given.cagsr.reward,
        )
        consents = self._consents(request, given)
        told: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        job = Job(asked, lambda event: _push(loop, told, event), streamed=bool(given.stream))
        try:
            self.engine.submit(job)
        except Busy as error:
            raise ApiError(429, str(error), code="rate_limit_exceeded") from None
        try:
            # On the disk before the answer's head is sent.
            kept = await run_in_threadpool(self.store.keep, text) if consents else None
        except CagsrError:
            job.cancelled.set()
            raise
        reply = Reply(self, given, asked, kept, f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}", chat)
        if given.stream:
            return StreamingResponse(reply.stream(job, told), media_type="text/event-stream")
        answered = await _or_gone(request, job, told)
        return JSONResponse(await reply.whole(answered))

    def _consents(self, request: Request, given: ChatRequest | CompletionRequest) -> bool:
        """Whether the prompt may be kept: body, header, or else the server's default say so; a no counts wherever it stands."""
        header = request.headers.get(CONSENT)
        if header is not None and header.lower() not in ("yes", "no"):
            raise ApiError(400, f"{CONSENT}: say yes or no.", param=CONSENT)
        said = [
            one for one in (given.cagsr.consent, None if header is None else header.lower() == "yes") if one is not None
        ]
        return all(said) if said else self.config.consent.default

    # ---- what is kept ----

    async def prompts(self, request: Request) -> Response:
        """The kept prompts, ``LISTED`` at a time, from behind the number ``after``."""
        after = request.query_params.get("after", "0")
        if not re.fullmatch("[0-9]{1,15}", after):
            raise ApiError(400, "after: give a prompt's number.", param="after")
        found = await run_in_threadpool(self.store.prompts, int(after), LISTED)
        return JSONResponse({"object": "list", "data": [asdict(one) for one in found]})

    async def remove(self, request: Request) -> Response:
        """Remove a prompt and its answers."""
        number = request.path_params["number"]
        if number >= 2**63 or not await run_in_threadpool(self.store.remove, number):
            raise ApiError(404, f"There is no prompt {number}.", param="id")
        return JSONResponse({"id": number, "object": "cagsr.prompt", "deleted": True})

    async def feedback(self, request: Request) -> Response:
        """A thumb for an answer that is kept."""
        given: Feedback = protocol.parsed(Feedback, await self._body(request))
        thumb = {"up": 1, "down": -1, None: None}[given.thumb]
        if not await run_in_threadpool(self.store.rate, given.id, given.index, thumb):
            raise ApiError(
                404, "No such answer is kept: only those to prompts that were sent with consent are.", param="id"
            )
        return JSONResponse({"id": given.id, "index": given.index, "thumb": given.thumb})

    # ---- what is learned ----

    async def tell_status(self, request: Request) -> Response:
        """What is served, kept and learned."""
        manifest = self.versions.manifest()
        counts = await run_in_threadpool(self.store.counts, manifest.trained)
        return JSONResponse(
            {"model": f"{self.config.served_name}@{manifest.current}", "kept": counts, "learning": self.status()}
        )

    async def tell_versions(self, request: Request) -> Response:
        """All versions, those that were refused too, with the numbers they were judged by."""
        return JSONResponse(await run_in_threadpool(list_versions, self.versions))

    async def roll_back(self, request: Request) -> Response:
        """Serve the version before the current one."""
        if self.versions.manifest().current == 0:
            raise ApiError(409, "The base model is served: there is no version before it.")
        number = await run_in_threadpool(self.versions.roll_back)
        return JSONResponse({"model": f"{self.config.served_name}@{number}", "version": number})

    async def _body(self, request: Request) -> bytes:
        limit = self.config.limits.body_bytes
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "A request must be JSON (Content-Type: application/json).")
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > limit:
                raise ApiError(413, f"The body is larger than {limit:,} bytes (--limits.body_bytes).")
        return bytes(content)


@dataclass
class Reply:
    """The answer to one request, on its way out."""

    server: Server
    given: ChatRequest | CompletionRequest
    asked: Asked
    kept: int | None
    id: str
    chat: bool
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self, answered: Answered) -> dict[str, Any]:
        """The response in one piece."""
        await self._keep(answered)
        return {
            **self._head("chat.completion" if self.chat else "text_completion"),
            "choices": protocol.choices(answered.writings, chat=self.chat),
            "usage": usage(len(self.asked.prompt.ids), answered.sampled_tokens),
            "cagsr": self._told(answered),
        }

    async def stream(self, job: Job, told: asyncio.Queue[Event]) -> AsyncIterator[bytes]:
        """The response in chunks; the last one holds what ``cagsr`` has to say. A client that leaves ends the sampling."""
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        with_usage = self.given.stream_options is not None and self.given.stream_options.include_usage
        none = {"usage": None} if with_usage else {}
        try:
            with self.server.activity:
                for place in range(self.asked.count) if self.chat else ():
                    yield _line({**head, "choices": [protocol.first_choice(place)], **none})
                while isinstance(event := await told.get(), Piece):
                    choice = chunk_choice(event, chat=self.chat, top=self.asked.top)
                    yield _line({**head, "choices": [choice], **none})
                if isinstance(event, Exception):
                    yield _line(_failure(event).body())
                    return
                await self._keep(event)
                counted = {"usage": usage(len(self.asked.prompt.ids), event.sampled_tokens)} if with_usage else {}
                yield _line({**head, "choices": [], **counted, "cagsr": self._told(event)})
                yield b"data: [DONE]\n\n"
        finally:
            job.cancelled.set()

    def _head(self, kind: str) -> dict[str, Any]:
        name = f"{self.server.config.served_name}@{self.asked.version}"
        return {"id": self.id, "object": kind, "created": self.created, "model": name}

    def _told(self, answered: Answered) -> dict[str, Any]:
        told: dict[str, Any] = {"version": answered.version, "kept": self.kept}
        if answered.worth is not None:
            told |= {"reward": [asdict(one) for one in answered.worth], "scales": answered.scales}
        if ignored := self.given.ignored():
            told["ignored"] = ignored
        return told

    async def _keep(self, answered: Answered) -> None:
        if self.kept is not None:
            texts = [one.text for one in answered.writings]
            await run_in_threadpool(self.server.store.keep_answers, self.kept, self.id, texts, answered.version)


def _line(body: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def _push(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Event], event: Event) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(queue.put_nowait, event)


async def _or_gone(request: Request, job: Job, told: asyncio.Queue[Event]) -> Answered:
    """The answers; a client that leaves meanwhile ends the sampling (ClientDisconnect)."""
    getting: Awaitable[Event] = asyncio.ensure_future(told.get())
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({getting, leaving}, return_when=asyncio.FIRST_COMPLETED)  # type: ignore[type-var]
        if not getting.done():  # type: ignore[attr-defined]
            raise ClientDisconnect
        event = await getting
    finally:
        job.cancelled.set()
        leaving.cancel()
        getting.cancel()  # type: ignore[attr-defined]
    if isinstance(event, Exception):
        raise _failure(event)
    assert isinstance(event, Answered)
    return event


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _failure(error: Exception) -> ApiError:
    """What went wrong with the model: a sentence of ours, or else the kind of error alone."""
    if isinstance(error, CagsrError):
        return ApiError(503, str(error))
    print(f"cagsr serve: {where(error)}", file=sys.stderr, flush=True)
    return ApiError(500, f"The model failed ({type(error).__name__}).")


def _unknown(error: HTTPException) -> ApiError:
    """A path or method that is not there."""
    told = {404: "There is no such address here.", 405: "This address takes another method."}
    return ApiError(error.status_code, told.get(error.status_code, str(error.detail)))
