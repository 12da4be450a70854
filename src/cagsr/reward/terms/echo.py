"""Echo: how much of the answer is the prompt's own words over again, beyond what an answer usually takes from it?

An answer that repeats its prompt, or lists the prompt's words, looks at all of them and copies all of them: every term that
pays for the prompt's content prefers it to a sentence, and the model itself finds it as natural as its own answers. What gives
it away is that it says nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from cagsr.config.ranges import PositiveInt, ShareBelowOne
from cagsr.flow import RewardBatch
from cagsr.prompts.find_words import find_words
from cagsr.reward.association import by_text
from cagsr.reward.registry import TermConfig, register

if TYPE_CHECKING:
    from cagsr.reward.settings import RewardConfig


@dataclass(frozen=True)
class EchoConfig(TermConfig):
    """Echo: share of the answer's words that are the prompt's, as far as it is above what is allowed."""

    weight: float = -5.0
    """Weight in the reward, negative for a penalty; 0 leaves the term out. The term is not brought to the scale of the others,
    because usual answers have none of it: this is what an answer costs that says the prompt's words alone."""
    allowed: ShareBelowOne = 0.8
    """Up to this share nothing is charged. cagsr diagnose recommends what the starting model's own answers have."""
    shortest: PositiveInt = 5
    """Answers of fewer words may be the prompt's word for word."""


@register
@dataclass(frozen=True)
class Echo:
    """Echo, :func:`echo`."""

    name: ClassVar[str] = "echo"
    needs: ClassVar[frozenset[str]] = frozenset()
    scale: ClassVar[float] = 1.0
    place: ClassVar[int] = 10
    settings: EchoConfig

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Return ``(batch,)``."""

        def measure(prompt: str, completion: str, template: Sequence[tuple[int, int]]) -> float:
            return echo(prompt, completion, template, self.settings.allowed, self.settings.shortest)

        return by_text(measure, batch.episodes)

    @staticmethod
    def advice(settings: EchoConfig, reward: RewardConfig) -> Iterator[str]:
        """A penalty is negative, and should be there."""
        if settings.weight > 0:
            yield "echo has a positive weight, which pays for repeating the prompt: a penalty has a negative one."


def copied_share(prompt: str, completion: str, template: Sequence[tuple[int, int]] = ()) -> tuple[float, int]:
    """Share of the answer's words, each occurrence counted, that the prompt holds too, and how many words it has.

    Extractive coverage of Grusky, Naaman & Artzi (NAACL 2018), by words (``find_words``); 0 for an answer without a word.
    """
    held = {word.key for word in find_words(prompt, template)}
    said = [word.key for word in find_words(completion)]
    return sum(word in held for word in said) / max(len(said), 1), len(said)


def echo(
    prompt: str, completion: str, template: Sequence[tuple[int, int]] = (), allowed: float = 0.8, shortest: int = 5
) -> float:
    """``max(0, share - allowed) / (1 - allowed)`` in [0, 1], the share of :func:`copied_share`; 0 below ``shortest`` words."""
    share, words = copied_share(prompt, completion, template)
    return max(0.0, share - allowed) / (1.0 - allowed) if words >= shortest else 0.0
