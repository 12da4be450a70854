"""SciTLDR for a pretrained model: few pairs for a supervised start, all other abstracts without summaries, and the test.

    python -m examples.scitldr.prepare --work runs/scitldr

writes ``sft.jsonl`` (pairs), ``prompts.jsonl`` and ``held_out.jsonl`` (the training file's other abstracts alone), ``test.jsonl``
(the abstracts of ``dev.jsonl`` with all their summaries), and ``labelled.jsonl``: the prompts *with* their summaries, for the
ceiling (``examples.scitldr.rewards.RougeToReference``) and for nothing else.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from cagsr.errors import DataError
from examples.e2e.prepare import Rows, read_jsonl, tidy, write_jsonl

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "scitldr"


@dataclass(frozen=True)
class Options:
    """Write the files."""

    work: Path = Path("runs/scitldr")
    """Folder to write into."""
    data: Path = SHARED
    """Folder with SciTLDR's train.jsonl and dev.jsonl (``source``: sentences, ``target``: summaries)."""
    pairs: int = 400
    """Pairs for the supervised start."""
    held_out: int = 60
    """Abstracts to watch training with and to choose settings on."""
    longest: int = 190
    """Abstracts of more words are left out everywhere (190 words are about 250 tokens)."""
    seed: int = 0
    """Seeds which abstracts are taken for what."""


def main(options: Options) -> None:
    """Write the files and say how many rows they have."""
    train, test = (read_rows(options.data / f"{name}.jsonl", options.longest) for name in ("train", "dev"))
    tested = {row["prompt"] for row in test}
    rows = [row for row in train if row["prompt"] not in tested]
    random.Random(options.seed).shuffle(rows)
    needed = options.pairs + options.held_out
    if len(rows) <= needed:
        raise DataError(f"{options.data}: {len(rows)} abstracts are left, and more than {needed} are needed.")
    pairs, held_out, others = rows[: options.pairs], rows[options.pairs : needed], rows[needed:]
    files: dict[str, Rows] = {
        "sft": [{"prompt": row["prompt"], "completion": " " + row["references"][0]} for row in pairs],
        "held_out": [{"prompt": row["prompt"]} for row in held_out],
        "prompts": [{"prompt": row["prompt"]} for row in others],
        "labelled": others,
        "test": test,
    }
    for name, some in files.items():
        write_jsonl(options.work / f"{name}.jsonl", some)
    print(f"{options.work}: " + ", ".join(f"{len(some)} {name}" for name, some in files.items()))


def read_rows(path: Path, longest: int) -> list[dict[str, Any]]:
    """Prompts with their summaries, each abstract once. Raises DataError for a row that is not SciTLDR's."""
    found: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(read_jsonl(path), start=1):
        try:
            abstract, references = tidy(" ".join(row["source"])), [tidy(text) for text in row["target"] if text.strip()]
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}, row {number}: not a row of SciTLDR ({error!r}); 'source' and 'target'."
            ) from error
        if references and len(abstract.split()) <= longest:
            prompt = as_prompt(abstract)
            found.setdefault(prompt, {"prompt": prompt, "references": references})
    return list(found.values())


def as_prompt(abstract: str) -> str:
    """An abstract as the model reads it; the summary follows behind a space."""
    return f"{abstract}\nTL;DR:"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
