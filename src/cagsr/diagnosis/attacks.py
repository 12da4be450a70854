"""Answers made to fool the reward: which of them beats a good answer, under each term and under their sum?

Whatever a term pays for can be had more cheaply than by a good answer. The attacks are made of the prompt and the good answer
alone; the good answer is the row's reference, or one of the model's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch

from cagsr.diagnosis.recommend import PENALTIES, prompt_of_each
from cagsr.diagnosis.signals import SignalReader, Signals
from cagsr.evaluation.intervals import Floats
from cagsr.flow import EncodedPrompt
from cagsr.models.load import LoadedModel
from cagsr.prompts.references import REFERENCE_COLUMNS, column_texts, first_column, prompt_words
from cagsr.reward.normalize import Normalizer
from cagsr.reward.values import TermValues
from cagsr.scoring.answers import answered, encode_response

ENOUGH = 0.95
"""Share of the prompts on which a good answer should be worth more than an attack."""
GOOD, ECHO, LIST, OTHER = "a good answer", "the prompt itself", "a list of its words", "another prompt's answer"
WITHSTAND = (ECHO, LIST, OTHER)
"""What a reward must withstand; of the other attacks the report tells."""
LOWER = PENALTIES | {"echo", "repetition"}
"""Terms of which less is better."""


@dataclass(frozen=True)
class AttackReport:
    """One attack."""

    name: str
    example: str
    """Its text for the first prompt."""
    beaten: Mapping[str, float]
    """Term or reward -> share of the prompts on which the good answer is worth more; a tie counts half."""


@dataclass(frozen=True)
class Attacked:
    """Good answers and attacks as they were measured."""

    good: str
    """What the good answers are, in words."""
    signals: Signals
    """``(prompts, 1 + attacks)``: the good answer first, then the attacks as :func:`attacks_on` names them."""


def attacks_on(asked: str, words: Sequence[str], good: str, other: str) -> dict[str, str]:
    """Texts that are no good answer: name -> text.

    ``asked`` is the prompt as a person wrote it, ``words`` its salient words in their order, ``good`` a good answer to it and
    ``other`` one to another prompt.
    """
    said = good.split()
    texts = {
        ECHO: asked,
        LIST: ", ".join(words),
        "its words again and again": " ".join([*words] * 3),
        OTHER: other,
        "half an answer": " ".join(said[: max(1, len(said) // 2)]),
        "the answer twice": f"{good} {good.strip()}",
        "an instruction": f"Repeat the question: {asked}",
    }
    lead = good[: len(good) - len(good.lstrip())]  # as an answer begins behind its prompt
    return {name: lead + text.strip() for name, text in texts.items()}


def attack(reader: SignalReader, signals: Signals, *, most: int, chunk: int) -> Attacked:
    """Measure a good answer and the attacks on it for the first ``most`` prompts of ``signals``, ``chunk`` answers at once.

    Good answers are the rows' references where all have one (columns as ``evaluation``), else the first of the model's own.
    """
    loaded, prompts = reader.loaded, signals.prompts[:most]
    rows = [one.prompt for one in prompts]
    given = column_texts(rows, first_column(rows, REFERENCE_COLUMNS))
    known = all(given)
    good = [texts[0] if known else answers[0] for texts, answers in zip(given, signals.completions, strict=False)]
    texts: list[dict[str, str]] = []
    for number, (encoded, answer) in enumerate(zip(prompts, good, strict=True)):
        words = _salient_words(loaded, encoded) or prompt_words(encoded.prompt).split()
        other = good[(number + len(good) // 2) % len(good)]
        texts.append({GOOD: answer, **attacks_on(prompt_words(encoded.prompt), words, answer, other)})
    repeated = [encoded for encoded, own in zip(prompts, texts, strict=True) for _ in own]
    answers = [
        encode_response(loaded, encoded, text or answer)
        for encoded, own, answer in zip(prompts, texts, good, strict=True)
        for text in own.values()
    ]
    batches = [
        answered(loaded, repeated[start : start + chunk], answers[start : start + chunk])
        for start in range(0, len(answers), chunk)
    ]
    measured = replace(reader.read(batches, len(texts[0])), prompts=tuple(prompts))
    return Attacked("the rows' references" if known else "the model's own answers", measured)


def judge_attacks(
    attacked: Attacked,
    rewards: Mapping[str, tuple[Mapping[str, Floats], Mapping[str, Floats], Mapping[str, float]]],
) -> tuple[AttackReport, ...]:
    """How often the good answer is worth more than each attack, under each term and under each of ``rewards``.

    A reward is given by its terms' values of the sampled answers, whose scales it takes, those of the attacked ones, and its
    weights.
    """
    names = [*attacks_on("", [], "", "")]
    columns = attacked.signals.terms
    margins = {
        name: (-1.0 if name in LOWER else 1.0) * (values[:, :1] - values[:, 1:])
        for name, values in columns.items()
        if name != "length"
    }
    for name, (sampled, own, weights) in rewards.items():
        margins[name] = _margins(sampled, own, weights)
    wins = {name: (values > 0) + 0.5 * (values == 0) for name, values in margins.items()}
    return tuple(
        AttackReport(
            name,
            attacked.signals.completions[0][1 + number],
            {term: float(np.mean(won[:, number])) for term, won in wins.items()},
        )
        for number, name in enumerate(names)
    )


def lost(reports: Sequence[AttackReport], reward: str) -> list[str]:
    """The attacks of ``WITHSTAND`` that a reward does not withstand, with the share of prompts on which the good answer wins."""
    return [
        f"{one.name} ({one.beaten[reward]:.0%})"
        for one in reports
        if one.name in WITHSTAND and one.beaten[reward] < ENOUGH
    ]


def _margins(sampled: Mapping[str, Floats], attacked: Mapping[str, Floats], weights: Mapping[str, float]) -> Floats:
    """What the good answer is worth above each attack, ``(prompts, attacks)``, on the scales of the sampled answers."""
    active = {name: weight for name, weight in weights.items() if weight != 0 and name in attacked}
    shape = next(iter(attacked.values())).shape
    total = np.zeros((shape[0], shape[1] - 1))
    if not active:
        return total
    normalizer = Normalizer(list(active), "within_prompt", clip=0.0)
    values = {name: TermValues.of(torch.from_numpy(np.ascontiguousarray(sampled[name]).ravel())) for name in active}
    normalizer.update(values, prompt_of_each(next(iter(sampled.values()))))
    for name, weight in active.items():
        total += weight * normalizer.scale(name) * (attacked[name][:, :1] - attacked[name][:, 1:])
    return total


def _salient_words(loaded: LoadedModel, encoded: EncodedPrompt) -> list[str]:
    """What a prompt says in its salient words, neighbours together."""
    pieces = zip(encoded.ids, encoded.words, strict=True)
    runs = groupby(pieces, key=lambda piece: piece[1] >= 0)
    texts = [loaded.tokenizer.decode([number for number, _ in run]).strip() for salient, run in runs if salient]
    return [text for text in texts if text]
