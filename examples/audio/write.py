"""Write the world's sounds and their files.

    python -m examples.audio.write --work runs/audio

writes ``pairs.jsonl`` (clips with the careless transcriber's transcripts), ``prompts.jsonl``, ``held_out.jsonl`` and ``test.jsonl``
(without), and the clips in ``clips/``. All rows have what was said as the ``reference``, which no reward sees but the ceiling's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from cagsr.support.extras import require
from examples.audio.world import RATE, rows, sound
from examples.e2e.prepare import write_jsonl


@dataclass(frozen=True)
class Options:
    """Write the files."""

    work: Path
    """Folder to write into."""
    pairs: int = 4000
    """Transcribed clips for the supervised start."""
    prompts: int = 1200
    """Clips without transcripts to train on."""
    held_out: int = 100
    """Clips to watch training with."""
    test: int = 300
    """Clips to judge by."""
    seed: int = 0
    """Seeds the clips and the transcriber."""


def main(options: Options) -> None:
    """Write all and say what was written."""
    require("The world of sounds", "audio")
    import soundfile

    asked = rows("prompts", options.prompts + options.held_out, options.seed)
    files = {
        "pairs": rows("pairs", options.pairs, options.seed),
        "prompts": asked[options.held_out :],
        "held_out": asked[: options.held_out],
        "test": rows("test", options.test, options.seed),
    }
    (options.work / "clips").mkdir(parents=True, exist_ok=True)
    for name, own in files.items():
        for number, (clip, row) in enumerate(own):
            path = options.work / "clips" / f"{name}-{number}.wav"
            soundfile.write(path, sound(clip, f"{options.seed} {path.name}"), RATE)
            row["audio"] = f"clips/{path.name}"
            row["words"] = [[word.name, round(word.start, 4), round(word.end, 4)] for word in clip]
        write_jsonl(options.work / f"{name}.jsonl", [row for _, row in own])
    print(f"{options.work}: {', '.join(f'{len(own)} {name}' for name, own in files.items())}.")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
