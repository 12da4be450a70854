"""Preference pairs for the E2E example: people's judgements in the example's format, and machine-made pairs.

    python -m examples.e2e.preferences --work runs/e2e

reads the work folder that ``examples.e2e.prepare`` made and writes ``human.train.jsonl`` and ``human.held_out.jsonl`` (split
by prompt) and ``synthetic.jsonl`` (made from ``sft.jsonl``) into it; ``--judge`` and ``--keep human`` add a file each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from cagsr.config import CorruptionConfig
from cagsr.errors import DataError
from cagsr.evaluation.metrics import words
from cagsr.preferences.corrupt import SupervisedPair, synthesize
from cagsr.preferences.pairs import split_by_prompt
from examples.e2e.facts import Fact, as_prompt, parse
from examples.e2e.prepare import SHARED, read_jsonl, tidy, write_jsonl
from examples.e2e.slots import check

Rows = list[dict[str, Any]]
Prompts = set[frozenset[Fact]]

EVALUATION = "evaluation.jsonl"
JUDGE = "human.judge.jsonl"
TRAINED_ON = (
    "sft.jsonl",
    "unlabelled.jsonl",
    "human.train.jsonl",
    "human.held_out.jsonl",
    "synthetic.jsonl",
)
"""Every file that some method is trained on (a held-out pair may become a training pair of another split)."""


@dataclass(frozen=True)
class Options:
    """Prepare preference pairs for the E2E NLG example."""

    work: Path = Path("runs/e2e")
    """Folder that examples.e2e.prepare wrote."""
    data: Path = SHARED
    """Folder with human_preferences.jsonl."""
    keep: Literal["test", "human"] = "test"
    """People judged answers to prompts of the test set: test keeps the whole test set and drops their judgements on it
    (few are left); human keeps all judgements and writes evaluation.jsonl, the test prompts that nobody judged."""
    held_out: float = 0.1
    """Share of the (other) prompts whose judgements are held out."""
    judge: float = 0.0
    """Share of the prompts, taken out first, whose judgements go to human.judge.jsonl: for a reward model that only judges
    and is never trained against."""
    synthetic: int = 3000
    """Machine-made pairs."""
    seed: int = 0
    """Seeds the split and the machine's mistakes."""


def main(options: Options) -> None:
    """Write the files, say how many rows they have, and how often people preferred what a simple rule would."""
    counts = prepare_preferences(options)
    print(f"{options.work}: " + ", ".join(f"{count:,} in {name}" for name, count in counts.items()))
    won = simple_rules(read_jsonl(options.work / "human.held_out.jsonl"))
    print(f"held-out pairs: {', '.join(f'{rule} wins {share:.1%}' for rule, share in won.items())}")


def prepare_preferences(options: Options) -> dict[str, int]:
    """Write the preference files; returns the number of rows of each file and of the judgements left out.

    Raises DataError where no judgement is left, or where a file to train on shares a prompt with the evaluation set.
    """
    test = read_jsonl(options.work / "test.jsonl")
    reserved = fact_sets(read_jsonl(options.work / "held_out.jsonl"))
    judged = human_rows(read_jsonl(options.data / "human_preferences.jsonl"))
    if options.keep == "test":
        evaluation = test
        reserved |= fact_sets(test)
    else:
        known = fact_sets(judged)
        evaluation = [row for row in test if facts_of(row) not in known]
    kept = [row for row in judged if facts_of(row) not in reserved]
    if not kept:
        raise DataError(f"{options.data}: all {len(judged)} judgements are on prompts of the evaluation set.")
    rest, judging = split_by_prompt(kept, options.judge, options.seed + 1, key=facts_of)
    train, held_out = split_by_prompt(rest, options.held_out, options.seed, key=facts_of)
    supervised = [SupervisedPair(row["prompt"], row["completion"]) for row in read_jsonl(options.work / "sft.jsonl")]
    synthetic, _ = synthesize(supervised, CorruptionConfig(), options.seed, options.synthetic)
    files: dict[str, Rows] = {
        "human.train.jsonl": train,
        "human.held_out.jsonl": held_out,
        "synthetic.jsonl": synthetic,
    }
    if judging:
        files[JUDGE] = judging
    if options.keep == "human":
        files[EVALUATION] = evaluation
    for name, rows in files.items():
        if name != EVALUATION and fact_sets(rows) & fact_sets(evaluation):
            raise DataError(f"{options.work / name}: shares prompts with the evaluation set; this is a bug.")
    for name, rows in files.items():
        write_jsonl(options.work / name, rows)
    for name in {JUDGE, EVALUATION} - set(files):  # of an earlier call, with another split
        (options.work / name).unlink(missing_ok=True)
    return {**{name: len(rows) for name, rows in files.items()}, "judgements left out": len(judged) - len(kept)}


def human_rows(rows: Iterable[dict[str, Any]]) -> Rows:
    """People's judgements with prompts and answers written as the example's models read and write them."""
    return [
        {
            "prompt": as_prompt(parse(row["prompt"])),
            "chosen": f" {tidy(row['chosen'])}",
            "rejected": f" {tidy(row['rejected'])}",
            "agreement": row["agreement"],
            "raters": row["raters"],
        }
        for row in rows
    ]


def simple_rules(pairs: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Share of the pairs in which the chosen answer is the one that a simple rule would choose; ties count half.

    What a reward model learns beyond length and completeness shows only above these.
    """
    rules = {
        "the longer answer": lambda pair, side: len(words(pair[side])),
        "the answer with fewer missed facts": lambda pair, side: -len(check(pair["prompt"], pair[side]).missed),
    }
    won: dict[str, list[float]] = {name: [] for name in rules}
    for pair in pairs:
        for name, rule in rules.items():
            chosen, rejected = rule(pair, "chosen"), rule(pair, "rejected")
            won[name].append(0.5 if chosen == rejected else float(chosen > rejected))
    return {name: sum(found) / max(len(found), 1) for name, found in won.items()}


def facts_of(row: dict[str, Any]) -> frozenset[Fact]:
    """The facts of a row's prompt, in no order."""
    return frozenset(parse(row["prompt"]))


def fact_sets(rows: Iterable[dict[str, Any]]) -> Prompts:
    """The different prompts of some rows, as sets of facts."""
    return {facts_of(row) for row in rows}


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
