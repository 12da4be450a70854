"""Sample answers over time: what each was paid for, and which words changed since the start's answer to its prompt."""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from cagsr.run_page.read_run import Run, is_number

MOST_CHARACTERS = 1_000_000
"""Prompts and answers on a page, over all runs, about as they stand in it."""
LONGEST = 6_000
"""Characters of one prompt or answer that are shown."""
_WORDS = re.compile(r"\s*\w+|\s*[^\w\s]|\s+")
"""Words and signs, each with the space before it."""


def word_diff(before: str, after: str) -> list[list[Any]]:
    """Tell a text from an earlier one, word by word: ``[sign, text]``, 0 for what is in both, -1 only before, 1 only after.

    The pieces, in reading order, with 0 and 1 together are ``after``; those with 0 and -1 are ``before``.
    """
    old, new = _WORDS.findall(before), _WORDS.findall(after)
    pieces: list[list[Any]] = []
    for kind, old_start, old_end, new_start, new_end in SequenceMatcher(None, old, new).get_opcodes():
        gone, come = "".join(old[old_start:old_end]), "".join(new[new_start:new_end])
        pieces += [[0, come]] if kind == "equal" else [piece for piece in ([-1, gone], [1, come]) if piece[1]]
    return pieces


def answers_of(run: Run, room: int) -> dict[str, Any]:
    """A run's sample answers, ready for JSON.

    An answer is compared with the earliest one to the same prompt and of the same kind (sampled in training, or greedy and
    held out): at step 0 or 1 that is the start's own, which no update has touched; ``first`` is what ``diff`` compares with.
    Steps are left out evenly where the texts have more than ``room`` characters; ``left_out`` says how many.
    """
    rows = [*_given(run.held_out, held_out=True), *_given(run.samples, held_out=False)]
    rows.sort(key=lambda row: row["step"])
    # A prompt's answers belong together: its earliest is looked for before any step is left out.
    earliest: dict[tuple[bool, str], dict[str, Any]] = {}
    for row in rows:
        earliest.setdefault((row["held_out"], row["prompt"]), row)
    steps = sorted({row["step"] for row in rows})
    kept = _even(steps, rows, room)
    prompts: dict[str, int] = {}
    shown = []
    for row in rows:
        if row["step"] not in kept:
            continue
        first = earliest[row["held_out"], row["prompt"]]
        entry = row | {"prompt": prompts.setdefault(row["prompt"], len(prompts))}
        if first is not row and first["step"] < row["step"]:
            entry["first"] = {"step": first["step"], "reward": first["reward"], "text": first["text"]}
            entry["diff"] = word_diff(first["text"], row["text"])
            entry["same"] = first["text"] == row["text"]
        shown.append(entry)
    return {"prompts": list(prompts), "rows": shown, "left_out": len(steps) - len(kept)}


def _given(rows: Iterable[Mapping[str, Any]], *, held_out: bool) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        if row.get("given"):  # the data's answer, not the model's
            continue
        terms, paid = row.get("terms") or {}, row.get("contributions") or {}
        found.append(
            {
                "step": row["step"],
                "held_out": held_out,
                "prompt": _cut(row.get("prompt", "")),
                "text": _cut(row.get("completion", "")),
                "reward": _number(row.get("reward")),
                "metric": _number(row.get("metric")),
                "terms": [[name, _number(terms.get(name)), _number(paid.get(name))] for name in {**terms, **paid}],
                "tokens": row.get("tokens"),
                "ended": row.get("ended"),
            }
        )
    return found


def _even(steps: Sequence[int], rows: Sequence[Mapping[str, Any]], room: int) -> set[int]:
    """Steps at even distances, the first and last among them, whose texts fit the room."""
    size: dict[int, int] = dict.fromkeys(steps, 0)
    for row in rows:
        # An answer that is compared stands there three times, an earlier one twice, and numbers take space too.
        size[row["step"]] += len(row["prompt"]) + 5 * len(row["text"]) + 300
    count = len(steps)
    while True:
        places = {round(number * (len(steps) - 1) / max(1, count - 1)) for number in range(count)}
        kept = {steps[place] for place in places}
        if count <= 2 or sum(size[step] for step in kept) <= room:
            return kept
        count = max(2, min(count - 1, int(count * 0.8)))


def _cut(text: Any) -> str:
    text = text if isinstance(text, str) else str(text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} [… {len(text) - LONGEST:,} characters more]"


def _number(value: Any) -> float | None:
    return float(value) if is_number(value) else None
