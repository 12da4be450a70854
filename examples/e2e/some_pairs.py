"""Take some of the supervised pairs, one for each prompt: ``python -m examples.e2e.some_pairs --work runs/supervision``."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import tyro

from examples.e2e.prepare import write_jsonl


@dataclass(frozen=True)
class Options:
    """Write some_pairs.jsonl."""

    work: Path
    """Folder with sft.jsonl, as examples.e2e.prepare leaves it."""
    count: int = 1000
    """Different prompts."""
    seed: int = 0
    """Which of them, and which of their references."""


def main(options: Options) -> None:
    """Draw and write."""
    rows = [json.loads(line) for line in (options.work / "sft.jsonl").read_text(encoding="utf-8").splitlines()]
    draw = random.Random(options.seed)
    draw.shuffle(rows)
    found = list({row["prompt"]: row for row in rows}.values())[: options.count]
    write_jsonl(options.work / "some_pairs.jsonl", found)
    print(f"{options.work / 'some_pairs.jsonl'}: {len(found)} pairs")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
