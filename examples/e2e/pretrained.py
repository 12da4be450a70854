"""E2E for a pretrained model: few pairs for a supervised start, all other prompts without answers, and the test prompts.

    python -m examples.e2e.pretrained --work runs/pretrained

writes, all in one form (a meaning representation, a line break and ``Description:``; sentences begin with a space):

- ``sft.jsonl``: pairs, one human sentence each; ``noisy.jsonl``: the same with a wrong sentence in a third of them,
- ``held_out.jsonl`` and ``prompts.jsonl``: the other meaning representations of the training file, no sentences,
- ``test.jsonl``: meaning representations that are in none of these, with all their human sentences.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from cagsr.config import CorruptionConfig
from cagsr.errors import DataError
from cagsr.preferences.corrupt import SupervisedPair, synthesize
from examples.e2e.facts import parse
from examples.e2e.prepare import SHARED, Rows, load_rows, tidy, write_jsonl
from examples.e2e.slots import check

MISTAKES = CorruptionConfig(drop=1.0, swap=1.0, invent=1.0, repeat=0.0, truncate=0.0, other=0.0)
"""A fact is dropped, swapped or invented, each as often."""


@dataclass(frozen=True)
class Options:
    """Write the files."""

    work: Path = Path("runs/pretrained")
    """Folder to write into."""
    data: Path = SHARED
    """As for ``examples.e2e.prepare``."""
    pairs: int = 320
    """Pairs for the supervised start."""
    held_out: int = 80
    """Prompts to watch training with and to choose settings on; the rest is trained on."""
    noise: float = 1 / 3
    """Share of the pairs that get a wrong sentence in ``noisy.jsonl``."""
    seed: int = 0
    """Seeds which meaning representations are taken, which sentence of each, and the mistakes."""


def main(options: Options) -> None:
    """Write the files and say what they hold."""
    train, test = load_rows(options.data)
    sentences: dict[str, list[str]] = {}
    for row in train:
        sentences.setdefault(row["prompt"], []).append(row["completion"])
    draw = random.Random(options.seed)
    meanings = sorted(sentences)
    draw.shuffle(meanings)
    tested = {frozenset(parse(row["prompt"])) for row in test}
    both = sum(frozenset(parse(meaning)) in tested for meaning in meanings)
    if both:
        raise DataError(f"{options.data}: {both} prompts of train are also in test; use disjoint files.")
    pairs = [
        {"prompt": as_prompt(meaning), "completion": " " + tidy(draw.choice(sentences[meaning]))}
        for meaning in meanings[: options.pairs]
    ]
    others = [{"prompt": as_prompt(meaning)} for meaning in meanings[options.pairs :]]
    files: dict[str, Rows] = {
        "sft": pairs,
        "noisy": with_mistakes(pairs, options.noise, options.seed),
        "held_out": others[: options.held_out],
        "prompts": others[options.held_out :],
        "test": [
            {"prompt": as_prompt(row["prompt"]), "references": [tidy(text) for text in row["references"]]}
            for row in test
        ],
    }
    for name, rows in files.items():
        write_jsonl(options.work / f"{name}.jsonl", rows)
    print(f"{options.work}: " + ", ".join(f"{len(rows)} {name}" for name, rows in files.items()))
    for name in ("sft", "noisy"):
        print(f"{name}: {about_errors(files[name])}")


def as_prompt(meaning: str) -> str:
    """A meaning representation as the model reads it."""
    return f"{meaning}\nDescription:"


def with_mistakes(pairs: Sequence[dict[str, str]], share: float, seed: int) -> Rows:
    """The same pairs, a share of them with a sentence in which a fact is dropped, swapped or invented.

    The mistakes are those of machine-made preferences (``cagsr synthesize``). Raises DataError where fewer pairs allow one.
    """
    supervised = [SupervisedPair(pair["prompt"], pair["completion"]) for pair in pairs]
    made, _ = synthesize(supervised, MISTAKES, seed)
    wanted = round(share * len(pairs))
    if len(made) < wanted:
        raise DataError(f"only {len(made)} of {len(pairs)} pairs allow a mistake, and {wanted} are to get one.")
    wrong = {row["prompt"]: row["rejected"] for row in made[:wanted]}  # each prompt stands once; made in random order
    return [{**pair, "completion": wrong.get(pair["prompt"], pair["completion"])} for pair in pairs]


def about_errors(pairs: Sequence[dict[str, str]]) -> str:
    """What the checker finds in the sentences, as a line to print."""
    reports = [check(pair["prompt"], pair["completion"]) for pair in pairs]
    total = sum(report.facts for report in reports)
    missed, wrong, added = (sum(len(getattr(one, kind)) for one in reports) for kind in ("missed", "wrong", "added"))
    bad = sum(bool(one.missed or one.added) for one in reports)
    return (
        f"{bad} of {len(reports)} sentences miss or add a fact; {100 * missed / total:.1f} % of the slots missed, "
        f"{100 * wrong / total:.1f} % of them with another value said, {100 * added / total:.1f} % added"
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
