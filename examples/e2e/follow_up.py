"""Training rows for the judge of follow-up perplexity: what people said next to what people said.

    python -m examples.e2e.follow_up --work runs/paper

writes ``follow_up.jsonl``: the supervised pairs, and for each meaning representation with several sentences one sentence
given another (``prompt``: facts and a sentence; ``completion``: another sentence for the same facts), varied copies included.
A judge trained on it (``pretrain --data``) finds a true sentence the likelier, the better the answer before it says the facts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from examples.e2e.augment import vary
from examples.e2e.facts import Fact, as_prompt, parse, take_inventory
from examples.e2e.prepare import SHARED, Rows, load_rows, read_jsonl, tidy, write_jsonl

_BETWEEN = " ¦ "


@dataclass(frozen=True)
class Options:
    """Write the judge's training rows."""

    work: Path = Path("runs/e2e")
    """Folder that ``examples.e2e.prepare`` wrote."""
    data: Path = SHARED
    """Folder with train.jsonl; where it is absent the Hub's GEM/e2e_nlg is read."""
    partners: int = 2
    """Sentences that each sentence is followed by."""
    seed: int = 1
    """Seeds the choice of partners and the varied copies."""


def main(options: Options) -> None:
    """Write ``follow_up.jsonl`` and say how many rows it has."""
    train, _ = load_rows(options.data)
    said: dict[tuple[Fact, ...], list[str]] = {}
    for row in train:
        said.setdefault(parse(row["prompt"]), []).append(tidy(row["completion"]))
    test = {frozenset(parse(row["prompt"])) for row in read_jsonl(options.work / "test.jsonl")}
    pairs = follow_ups(said, options.partners, random.Random(options.seed))
    rows = [row for row in pairs if frozenset(parse(str(row["facts"]))) not in test]
    supervised = read_jsonl(options.work / "sft.jsonl")
    write_jsonl(options.work / "follow_up.jsonl", [*supervised, *rows])
    print(f"{options.work / 'follow_up.jsonl'}: {len(supervised):,} pairs, {len(rows):,} sentences after sentences")


def follow_ups(said: dict[tuple[Fact, ...], list[str]], partners: int, generator: random.Random) -> Rows:
    """One row for each sentence and each of its partners, and a varied copy of it (other names and values throughout)."""
    inventory = take_inventory(said)
    rows: Rows = []
    for facts, texts in said.items():
        for text in texts:
            others = [other for other in texts if other != text]
            for other in generator.sample(others, min(partners, len(others))):
                rows.append(_row(facts, text, other))
                varied = vary(facts, f"{text}{_BETWEEN}{other}", inventory, generator)
                if varied is not None and varied[1].count(_BETWEEN) == 1:
                    rows.append(_row(varied[0], *varied[1].split(_BETWEEN)))
    return rows


def _row(facts: Sequence[Fact], before: str, after: str) -> dict[str, str]:
    prompt = as_prompt(facts)
    return {"prompt": f"{prompt} {before}", "completion": f" {after}", "facts": prompt}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
