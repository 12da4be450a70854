"""E2E for a pretrained model: few pairs for a supervised start, and other prompts to diagnose and train on.

    python -m examples.e2e.pretrained --work runs/pretrained

writes ``sft.jsonl`` (a meaning representation, a line break and ``Description:``; one of its human sentences behind a space) and
``prompts.jsonl`` (other meaning representations, no sentences).
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import tyro

from examples.e2e.prepare import SHARED, load_rows


@dataclass(frozen=True)
class Options:
    """Write the files."""

    work: Path = Path("runs/pretrained")
    """Folder to write into."""
    data: Path = SHARED
    """As for ``examples.e2e.prepare``."""
    pairs: int = 320
    """Pairs for the supervised start."""
    prompts: int = 80
    """Prompts besides."""
    seed: int = 0
    """Seeds which meaning representations are taken, and which sentence of each."""


def main(options: Options) -> None:
    """Write ``sft.jsonl`` and ``prompts.jsonl``."""
    train, _ = load_rows(options.data)
    sentences: dict[str, list[str]] = {}
    for row in train:
        sentences.setdefault(row["prompt"], []).append(row["completion"])
    draw = random.Random(options.seed)
    meanings = sorted(sentences)
    draw.shuffle(meanings)
    pairs = [
        {"prompt": _prompt(meaning), "completion": " " + " ".join(draw.choice(sentences[meaning]).split())}
        for meaning in meanings[: options.pairs]
    ]
    prompts = [{"prompt": _prompt(meaning)} for meaning in meanings[options.pairs : options.pairs + options.prompts]]
    options.work.mkdir(parents=True, exist_ok=True)
    for name, rows in (("sft", pairs), ("prompts", prompts)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (options.work / f"{name}.jsonl").write_text(text, encoding="utf-8")
    print(f"{options.work}: {len(pairs)} pairs, {len(prompts)} prompts")


def _prompt(meaning: str) -> str:
    return f"{meaning}\nDescription:"


if __name__ == "__main__":
    main(tyro.cli(Options))
