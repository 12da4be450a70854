"""OpenAI's requests as they are read, and its answers, chunks and errors as they are written.

A field that this server can't honour is refused, unless it says what would be done anyway (``frequency_penalty: 0``); a few that
change no answer are accepted, and the answer says that they were ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
)

from cagsr.serving.writing import Piece, TokenChance, Writing

IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Fields that change no answer: they are accepted, not kept, and the answer says so."""


class ApiError(Exception):
    """A request that is refused: OpenAI's error body, and its status."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The body as JSON."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _temperature(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 0.01:
        raise ValueError("must be 0 (greedy), or from 0.01 to 2")
    return value


class CagsrFields(_Fields):
    """What is ours in a request."""

    consent: bool | None = None
    """The prompt and its answers may be kept, and trained on."""
    reward: bool = False
    """Say what each answer is worth."""
    best_of: Annotated[int, Field(ge=1)] | None = None
    """Sample so many answers, and give the ``n`` best by the reward."""


class StreamOptions(_Fields):
    """What is streamed besides the answers."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class Request(_Fields):
    """What chat and completions have in common."""

    model: Annotated[str, Field(max_length=300)]
    n: Annotated[int, Field(ge=1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=8)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2), BeforeValidator(_temperature)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cagsr: CagsrFields = CagsrFields()
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: str | None = None

    def stops(self) -> tuple[str, ...]:
        """The stop strings; ApiError for an empty one."""
        found = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if "" in found:
            raise ApiError(400, "stop: an empty text would end every answer at once; leave it out.", param="stop")
        return found

    def ignored(self) -> list[str]:
        """The fields that were given and change nothing."""
        return [name for name in IGNORED if getattr(self, name, None) is not None]


class TextPart(_Fields):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


def _embedded(url: str) -> str:
    if not re.match(r"data:image/[\w.+-]+;base64,", url):
        raise ValueError(
            "must be the image itself, data:image/...;base64,...: nothing is downloaded, and no file is read"
        )
    return url


class ImageUrl(_Fields):
    """An image."""

    url: Annotated[str, AfterValidator(_embedded)]
    detail: Literal["auto"] | None = None


class ImagePart(_Fields):
    """A part of a message's content that is an image."""

    type: Literal["image_url"]
    image_url: ImageUrl


_Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
_Content = Annotated[
    # One kind is tried, the one that is meant, so that its errors are told.
    Annotated[str, Tag("text")] | Annotated[list[_Part], Tag("parts")],
    Discriminator(lambda value: "text" if isinstance(value, str) else "parts"),
]


class Message(_Fields):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: _Content

    def given(self) -> str | list[dict[str, Any]]:
        """The content as one text, or, with images, as parts."""
        if isinstance(self.content, str):
            return self.content
        if any(isinstance(part, ImagePart) for part in self.content):
            return [part.model_dump(exclude_none=True) for part in self.content]
        return "".join(part.text for part in self.content if isinstance(part, TextPart))


class ChatRequest(Request):
    """A request for the answer to a conversation."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def prompt_text(self) -> list[dict[str, Any]]:
        """The conversation, each content as one text or, with images, as parts; templates know a developer as system."""
        return [
            {"role": "system" if one.role == "developer" else one.role, "content": one.given()} for one in self.messages
        ]

    def top(self) -> int | None:
        """How many likely tokens are told with each; None: no log-probabilities."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs: give logprobs: true with it.", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Request):
    """A request for what goes on behind a text."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    best_of: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None

    def prompt_text(self) -> str:
        """The text."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]

    def top(self) -> int | None:
        """How many likely tokens are told with each; None: no log-probabilities."""
        return self.logprobs


class Feedback(_Fields):
    """A thumb for an answer."""

    id: Annotated[str, Field(max_length=100)]
    """That of the completion."""
    index: Annotated[int, Field(ge=0)] = 0
    """Which of its choices."""
    thumb: Literal["up", "down"] | None
    """None takes an earlier one back."""


def parsed(kind: type[BaseModel], content: bytes) -> Any:
    """Read a body; ApiError, one sentence, for what can't be read. What was sent is not repeated but for fields' names."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:100]
        if first["type"] == "json_invalid":
            raise ApiError(
                400, f"The body is not valid JSON ({first['msg'].removeprefix('Invalid JSON: ')})."
            ) from None
        if first["type"] == "extra_forbidden":
            raise ApiError(400, f"{place}: this server knows no such field; leave it out.", param=place) from None
        told = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        raise ApiError(400, f"{place or 'The body'}: {told}.", param=place or None) from None


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts; of best-of-N every sampled token counts."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def chat_logprobs(chances: Sequence[TokenChance]) -> dict[str, Any]:
    """A chat answer's log-probabilities."""

    def told(token: str, logprob: float) -> dict[str, Any]:
        # Half a character has no bytes that could be told from the token alone.
        return {
            "token": token,
            "logprob": logprob,
            "bytes": None if "\ufffd" in token else list(token.encode()),
        }

    return {
        "content": [
            {**told(one.token, one.logprob), "top_logprobs": [told(*likely) for likely in one.top]} for one in chances
        ],
        "refusal": None,
    }


def completion_logprobs(chances: Sequence[TokenChance]) -> dict[str, Any]:
    """A completion's log-probabilities."""
    return {
        "tokens": [one.token for one in chances],
        "token_logprobs": [one.logprob for one in chances],
        "top_logprobs": [dict(one.top) for one in chances] if any(one.top for one in chances) else None,
        "text_offset": [one.start for one in chances],
    }


def choices(writings: Sequence[Writing], *, chat: bool) -> list[dict[str, Any]]:
    """The answers of a response that is not streamed."""
    found: list[dict[str, Any]] = []
    for index, one in enumerate(writings):
        choice: dict[str, Any] = {"index": index, "finish_reason": one.finish}
        if chat:
            choice |= {"message": {"role": "assistant", "content": one.text, "refusal": None}}
            choice |= {"logprobs": None if one.top is None else chat_logprobs(one.chances)}
        else:
            choice |= {"text": one.text, "logprobs": None if one.top is None else completion_logprobs(one.chances)}
        found.append(choice)
    return found


def chunk_choice(piece: Piece, *, chat: bool, top: int | None) -> dict[str, Any]:
    """A piece of an answer in a stream."""
    choice: dict[str, Any] = {"index": piece.place, "finish_reason": piece.finish}
    if chat:
        delta = {"content": piece.text} if piece.text else {}
        return {**choice, "delta": delta, "logprobs": None if top is None else chat_logprobs(piece.chances)}
    return {**choice, "text": piece.text, "logprobs": None if top is None else completion_logprobs(piece.chances)}


def first_choice(place: int) -> dict[str, Any]:
    """How each answer of a chat begins in a stream."""
    return {"index": place, "delta": {"role": "assistant", "content": ""}, "finish_reason": None, "logprobs": None}


def model_card(name: str, created: int, number: int, current: bool) -> Mapping[str, Any]:
    """One model in the list; ``current``: it is what the name without a version stands for."""
    cagsr = {"version": number, "current": current}
    return {"id": f"{name}@{number}", "object": "model", "created": created, "owned_by": "cagsr", "cagsr": cagsr}
