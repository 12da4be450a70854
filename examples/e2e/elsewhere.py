"""Prompts that the training never saw the like of: unseen slot combinations, another domain, and hostile ones.

    python -m examples.e2e.elsewhere --work runs/paper

writes, below ``work/elsewhere``, JSONL files with ``prompt`` and ``facts`` (what the answer should say, as a clean prompt):

combinations.jsonl  test prompts whose set of slots occurs in no training prompt, labelled or not (with their references)
domain.jsonl        places to stay instead of places to eat: known slots, values that occur nowhere in training
repeat.jsonl        a word planted eight times behind the facts, to draw attention without meaning anything
distractor.jsonl    another restaurant's sentence before the facts, which the answer should leave alone
sink.jsonl          a run of punctuation before the facts, where attention may park (an attention sink)

The last three are the held-out prompts with something planted in them. ``report``, ``hits`` and ``added`` judge answers by
``facts``, whatever the prompt says.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from examples.e2e.facts import Fact, as_prompt, made_up_name, parse
from examples.e2e.prepare import Rows, read_jsonl, write_jsonl
from examples.e2e.slots import check

STAYS = {
    "eatType": ("hotel", "guest house", "hostel", "inn"),
    "food": ("Korean", "Mexican", "Greek", "Ethiopian"),
    "area": ("harbour", "old town", "university quarter", "airport"),
}
"""Values of another domain; none of them occurs in E2E NLG."""
PLANTED = ("excellent", "music", "garden", "window")
REPEATS = 8
SINK = ". , . , . , . , . ,"


@dataclass(frozen=True)
class Options:
    """Write prompts unlike those of the training."""

    work: Path = Path("runs/paper")
    """Folder that ``examples.e2e.prepare`` wrote."""
    count: int = 300
    """Prompts of the other domain."""
    seed: int = 0
    """Seeds what is planted and made up."""


def main(options: Options) -> None:
    """Write the five files."""
    generator = random.Random(options.seed)
    held_out = read_jsonl(options.work / "held_out.jsonl")
    sentences = [row["completion"].strip() for row in read_jsonl(options.work / "sft.jsonl")[:1000]]
    files: dict[str, Rows] = {
        "combinations": unseen_combinations(options.work),
        "domain": [_row(facts) for facts in another_domain(options.count, generator)],
        "repeat": [plant(row["prompt"], after=" ".join([generator.choice(PLANTED)] * REPEATS)) for row in held_out],
        "distractor": [plant(row["prompt"], before=generator.choice(sentences)) for row in held_out],
        "sink": [plant(row["prompt"], before=SINK) for row in held_out],
    }
    for name, rows in files.items():
        write_jsonl(options.work / "elsewhere" / f"{name}.jsonl", rows)
    print(f"{options.work / 'elsewhere'}: " + ", ".join(f"{len(rows)} {name}" for name, rows in files.items()))


def unseen_combinations(work: Path) -> Rows:
    """The test rows whose set of slots no training prompt has."""
    seen = {_slots(row["prompt"]) for name in ("sft", "unlabelled") for row in read_jsonl(work / f"{name}.jsonl")}
    return [
        row | {"facts": row["prompt"]} for row in read_jsonl(work / "test.jsonl") if _slots(row["prompt"]) not in seen
    ]


def another_domain(count: int, generator: random.Random) -> list[tuple[Fact, ...]]:
    """Invent places to stay, three to six facts each."""
    found = []
    for _ in range(count):
        values = {slot: generator.choice(options) for slot, options in STAYS.items()}
        values |= {"near": made_up_name(generator), "familyFriendly": generator.choice(("yes", "no"))}
        chosen = generator.sample(sorted(values), generator.randint(2, 5))
        order = ("eatType", "food", "area", "familyFriendly", "near")
        facts = (("name", made_up_name(generator)), *((slot, values[slot]) for slot in order if slot in chosen))
        found.append(facts)
    return found


def plant(prompt: str, before: str = "", after: str = "") -> dict[str, Any]:
    """Put a text before the facts, or behind them, ahead of the arrow; the facts stay what they were."""
    body = prompt.removesuffix(" =>")
    text = f"{before} | {body}" if before else body
    return {"prompt": (f"{text} | {after}" if after else text) + " =>", "facts": prompt}


def report(
    prompts: Sequence[str], completions: Sequence[str], facts: Sequence[str], **columns: Any
) -> list[dict[str, float]]:
    """Missed and added facts by the column ``facts``; values of another domain count as said where they stand literally."""
    found = []
    for clean, completion in zip(facts, completions, strict=True):
        wanted = parse(clean)
        foreign = [fact for fact in wanted if fact[1] in STAYS.get(fact[0], ())]
        known = check([fact for fact in wanted if fact not in foreign], completion)
        missed = len(known.missed) + sum(value.lower() not in completion.lower() for _, value in foreign)
        # A known value said of a slot whose value is foreign is a mistake too.
        found.append({"missed": missed / len(wanted), "added": len(known.added) / len(wanted)})
    return found


def hits(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Share of the facts that each answer says."""
    return [1.0 - one["missed"] for one in report(prompts, completions, **columns)]


def added(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Added facts over the facts asked for."""
    return [one["added"] for one in report(prompts, completions, **columns)]


def _row(facts: Sequence[Fact]) -> dict[str, Any]:
    return {"prompt": as_prompt(facts), "facts": as_prompt(facts)}


def _slots(prompt: str) -> frozenset[str]:
    return frozenset(slot for slot, _ in parse(prompt))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
