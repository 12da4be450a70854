"""One answer while it is written: tokens in, text and log-probabilities out, up to where it stops."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from cagsr.scoring.answers import Response

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenChance:
    """A token of an answer, and how likely it was: the model's own log-probabilities, at temperature 1."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()
    """The likeliest tokens at its place, the likeliest first."""
    start: int = 0
    """Where it begins in the answer's text."""


@dataclass(frozen=True)
class Piece:
    """What has come of an answer since the last piece."""

    place: int
    text: str
    chances: tuple[TokenChance, ...]
    finish: Finish | None = None


@dataclass
class Writing:
    """An answer while it is written.

    ``text_of`` makes text of tokens, ``token_of`` shows a single one; ``top`` is how many likely tokens are told with each (None:
    no log-probabilities are asked for); ``say`` is handed pieces as they come, of which a stop string can take none back.
    """

    place: int
    text_of: Callable[[Sequence[int]], str]
    token_of: Callable[[int], str]
    stop_ids: frozenset[int]
    stop: tuple[str, ...]
    max_tokens: int
    top: int | None = None
    say: Callable[[Piece], None] | None = None
    ids: list[int] = field(default_factory=list)
    text: str = ""
    chances: list[TokenChance] = field(default_factory=list)
    finish: Finish | None = None
    _told: int = 0  # characters
    _told_chances: int = 0

    def add(self, token: int, logprobs: Tensor | None = None) -> None:
        """Take in a token with the log-probabilities ``(vocabulary,)`` it was drawn from; nothing once the answer is over."""
        if self.finish is not None:
            return
        self.ids.append(token)
        if token in self.stop_ids:
            self.finish = "stop"
        else:
            start, self.text = len(self.text), self.text_of(self.ids)
            if logprobs is not None and self.top is not None:
                self.chances.append(self._chance(token, logprobs, start))
            cut = min((at for stop in self.stop if (at := self.text.find(stop)) >= 0), default=None)
            if cut is not None:
                self.text, self.finish = self.text[:cut], "stop"
                self.chances = [one for one in self.chances if one.start < cut]
            elif len(self.ids) >= self.max_tokens:
                self.finish = "length"
        self._tell()

    def response(self) -> Response:
        """The answer as scoring takes it."""
        return Response(self.text, tuple(self.ids), self.finish == "stop")

    def _chance(self, token: int, logprobs: Tensor, start: int) -> TokenChance:
        top: tuple[tuple[str, float], ...] = ()
        if self.top:
            values, numbers = logprobs.topk(min(self.top, len(logprobs)))
            pairs = zip(numbers.tolist(), values.tolist(), strict=True)
            top = tuple((self.token_of(number), value) for number, value in pairs)
        return TokenChance(self.token_of(token), float(logprobs[token]), top, start)

    def _tell(self) -> None:
        if self.say is None:
            return
        sure = len(self.text) if self.finish else self._sure()
        if sure <= self._told and self.finish is None:
            return
        ready = [one for one in self.chances[self._told_chances :] if self.finish or one.start < sure]
        self.say(Piece(self.place, self.text[self._told : sure], tuple(ready), self.finish))
        self._told, self._told_chances = max(sure, self._told), self._told_chances + len(ready)

    def _sure(self) -> int:
        """How many characters stay whatever comes: not half a character, nor what may be a stop string's beginning."""
        text = self.text.rstrip("\ufffd")
        longest = max((_overlap(text, stop) for stop in self.stop), default=0)
        return len(text) - longest


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of ``text`` are the first ones of ``stop``."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
