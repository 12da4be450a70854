"""Which fields are spoken of, and where the stock phrase is said of nothing: counted in the answers that a comparison has kept.

    python -m examples.images.fields --work runs/images

For every method: of the fields that show something the share spoken of, by field, and of the pictures with an empty centre
the share whose description has the annotator's stock phrase.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from cagsr.compare.jobs import MATCHED, SAMPLED
from cagsr.evaluation.intervals import Floats, paired_difference
from examples.images.facts import Fact, stated, truth
from examples.images.world import PLACES, STOCK


@dataclass(frozen=True)
class Options:
    """Count."""

    work: Path
    """The comparison's work folder."""


def main(options: Options) -> None:
    """Print a line for each method and way of answering, over all its seeds, and the habit against the start's."""
    rows = [json.loads(line) for line in (options.work / "test.jsonl").read_text().splitlines()]
    facts = [row["facts"] for row in rows]
    answers: dict[str, dict[str, list[list[str]]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted((options.work / "results").glob("*.json")):
        found = json.loads(path.read_text())
        for how, texts in found["texts"].items():
            answers[found["method"]][how].append(texts)
    for method, hows in answers.items():
        for how, seeds in hows.items():
            shares = " ".join(f"{place} {share:.2f}" for place, share in spoken_of(seeds, facts).items())
            print(f"{method}, {how}: {shares}; stock phrase of an empty centre {habit(seeds, facts).mean():.3f}")
        if MATCHED in hows:
            less = paired_difference(habit(hows[SAMPLED], facts), habit(hows[MATCHED], facts))
            print(f"{method}, {SAMPLED} less {MATCHED}: stock phrase of an empty centre {less}")


def spoken_of(seeds: Sequence[Sequence[str]], facts: Sequence[Sequence[str]]) -> dict[str, float]:
    """Of the pictures that show something in a field the share whose description speaks of it; a description a picture and seed."""
    said: dict[str, list[bool]] = {place: [] for place in PLACES}
    for texts in seeds:
        for text, own in zip(texts, facts, strict=True):
            told = _places(stated(text))
            for place in _places(truth(own)):
                said[place].append(place in told)
    return {place: sum(own) / max(1, len(own)) for place, own in said.items()}


def habit(seeds: Sequence[Sequence[str]], facts: Sequence[Sequence[str]]) -> Floats:
    """``(seeds, pictures with an empty centre)``: 1 where the stock phrase is said all the same."""
    phrase = truth([STOCK.said()])
    empty = [number for number, own in enumerate(facts) if STOCK.place not in _places(truth(own))]
    return np.array([[float(phrase <= stated(texts[number])) for number in empty] for texts in seeds])


def _places(facts: set[Fact]) -> set[str]:
    return {place for place, _, _ in facts}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
