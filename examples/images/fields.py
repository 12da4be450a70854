"""Which fields are spoken of, and where the stock phrase is said of nothing: counted in the answers that a comparison has kept.

    python -m examples.images.fields --work runs/images

For every method: of the fields that show something the share spoken of, by field, and of the pictures with an empty centre
the share whose description has the annotator's stock phrase.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from examples.images.facts import stated, truth
from examples.images.world import PLACES, STOCK


@dataclass(frozen=True)
class Options:
    """Count."""

    work: Path
    """The comparison's work folder."""


def main(options: Options) -> None:
    """Print a line for each method and way of answering, over all its seeds."""
    rows = [json.loads(line) for line in (options.work / "test.jsonl").read_text().splitlines()]
    facts = [row["facts"] for row in rows]
    answers: dict[str, list[tuple[str, Sequence[str]]]] = defaultdict(list)
    for path in sorted((options.work / "results").glob("*.json")):
        found = json.loads(path.read_text())
        for how, texts in found["texts"].items():
            answers[f"{found['method']}, {how}"] += zip(texts, facts, strict=False)
    for line in lines(answers):
        print(line)


def lines(answers: dict[str, list[tuple[str, Sequence[str]]]]) -> Iterator[str]:
    """``name: northwest 0.45 ... ; stock phrase of an empty centre 0.29``; answers with the facts of their pictures."""
    phrase = truth([STOCK.said()])
    for name, pairs in answers.items():
        said: dict[str, list[bool]] = {place: [] for place in PLACES}
        habit: list[bool] = []
        for text, own in pairs:
            told, full = stated(text), {place for place, _, _ in truth(own)}
            for place in full:
                said[place].append(any(place == one for one, _, _ in told))
            if STOCK.place not in full:
                habit.append(phrase <= told)
        shares = " ".join(f"{place} {sum(own) / max(1, len(own)):.2f}" for place, own in said.items())
        yield f"{name}: {shares}; stock phrase of an empty centre {sum(habit) / max(1, len(habit)):.3f}"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
