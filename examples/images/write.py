"""Write the world's pictures and their files.

    python -m examples.images.write --work runs/images

writes ``pairs.jsonl`` (pictures with the careless annotator's captions), ``prompts.jsonl`` and ``held_out.jsonl`` (without),
``test.jsonl`` (for each picture with the name of one that shares no fact with it), and the pictures in ``pictures/``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import tyro

from examples.e2e.prepare import write_jsonl
from examples.images.facts import swaps
from examples.images.world import picture, rows


@dataclass(frozen=True)
class Options:
    """Write the files."""

    work: Path
    """Folder to write into."""
    pairs: int = 6000
    """Captioned pictures for the supervised start."""
    prompts: int = 1500
    """Pictures without captions to train on."""
    held_out: int = 100
    """Pictures to watch training with."""
    test: int = 400
    """Pictures to judge by."""
    seed: int = 0
    """Seeds the pictures and the annotator."""


def main(options: Options) -> None:
    """Write all and say what was written."""
    asked = rows("prompts", options.prompts + options.held_out, options.seed)
    files = {
        "pairs": rows("pairs", options.pairs, options.seed),
        "prompts": asked[options.held_out :],
        "held_out": asked[: options.held_out],
        "test": rows("test", options.test, options.seed),
    }
    (options.work / "pictures").mkdir(parents=True, exist_ok=True)
    for name, own in files.items():
        for number, (things, row) in enumerate(own):
            path = options.work / "pictures" / f"{name}-{number}.png"
            picture(things, random.Random(f"{options.seed} {path.name}")).save(path)
            row["images"] = [f"pictures/{path.name}"]
        if name == "test":
            others = swaps([row["facts"] for _, row in own])
            for (_, row), other in zip(own, others, strict=True):
                row["swapped"] = own[other][1]["images"][0]
        write_jsonl(options.work / f"{name}.jsonl", [row for _, row in own])
    print(f"{options.work}: {', '.join(f'{len(own)} {name}' for name, own in files.items())}.")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
