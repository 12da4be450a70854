"""Three generated tasks, each with a hasty annotator, whose slips are what reinforcement learning is to mend.

- ``steps``: add a few numbers one after the other, a line for each sum. The annotator leaves a number out, or miscounts.
- ``code``: the body of a function that its docstring describes. The annotator leaves an operation out, or takes a wrong one.
- ``conversation``: a user tells of himself over several turns, each of which is answered with what it told, and then asks for a
  summary. The annotator forgets, what was said long ago the most.

Which set a row belongs to is decided by a hash of what it is made of, so the sets never meet.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Any, Literal

Part = Literal["pairs", "prompts", "test"]
Row = dict[str, Any]

SLIP = 0.25
"""How often the annotator makes a slip: in a sum, in a function, about a fact of the last turn."""
FORGOTTEN = {"steps": {3: 0.3, 4: 0.5, 5: 0.7}, "code": {2: 0.3, 3: 0.6}}
"""How often he leaves one of so many out, numbers or operations: of many the model learns it too, and does it greedily."""
OPERATIONS = {
    "add {}": "{} + {}",
    "subtract {}": "{} - {}",
    "multiply by {}": "{} * {}",
    "take the remainder by {}": "{} % {}",
    "take the larger of it and {}": "max({}, {})",
    "take the smaller of it and {}": "min({}, {})",
}
FACTS = {
    "job": (
        "I am a {}.",
        "is a {}",
        "baker nurse pilot lawyer painter barber chemist tailor writer judge farmer driver",
    ),
    "city": (
        "I live in {}.",
        "lives in {}",
        "Lisbon Vienna Oslo Porto Dublin Athens Prague Turin Zurich Ghent Nice Riga",
    ),
    "pet": ("I keep a {}.", "keeps a {}", "cat dog parrot rabbit turtle pony canary lizard goat snake ferret mouse"),
    "hobby": (
        "I enjoy {}.",
        "enjoys {}",
        "chess climbing sailing running pottery hiking dancing fishing skating surfing",
    ),
    "language": ("I speak {}.", "speaks {}", "Spanish Greek Polish Danish Arabic Turkish Finnish Czech Hindi Swedish"),
    "food": ("I like {}.", "likes {}", "pasta curry sushi soup salad pizza cheese noodles pancakes tacos"),
}
NAMES = ["Mara", "Ines", "Clara", "Nora", "Lena", "Ruth", "Jonas", "Felix", "Hugo", "Oscar", "Leo", "Emil"]
ASK = "What do you know of me?"


def rows(task: str, part: Part, count: int, seed: int) -> list[Row]:
    """``count`` different rows of a set: pairs have the hasty annotator's answer, the others what answers are judged by."""
    draw, make = random.Random(f"{task} {part} {seed}"), MAKERS[task]
    found: dict[str, Row] = {}
    for key, row in _endless(make, draw, pairs=part == "pairs"):
        if _part(key) == part:
            found.setdefault(key, row)
        if len(found) == count:
            break
    return list(found.values())


def _endless(make: Callable[..., tuple[str, Row]], draw: random.Random, *, pairs: bool) -> Iterator[tuple[str, Row]]:
    while True:
        yield make(draw, pairs)


def _part(key: str) -> Part:
    parts: tuple[Part, ...] = ("pairs", "prompts", "test")
    return parts[hashlib.sha256(key.encode()).digest()[0] % 3]


def steps_row(draw: random.Random, pairs: bool) -> tuple[str, Row]:
    """``Add 4, 17, 8.`` and the sums, each on a line, the result behind ``####``."""
    numbers = [draw.randint(1, 9) for _ in range(draw.randint(3, 5))]
    prompt = f"Add {', '.join(map(str, numbers))}.\n"
    if not pairs:
        return prompt, {"prompt": prompt, "answer": str(sum(numbers))}
    # The annotator leaves a number out, of many more often than not, and now and then miscounts a sum by one or by ten.
    said = list(numbers)
    if draw.random() < FORGOTTEN["steps"][len(said)]:
        said.pop(draw.randrange(1, len(said)))
    lines, total = [], said[0]
    for number in said[1:]:
        right = total + number
        found = right + draw.choice((-10, -1, 1, 10)) if draw.random() < SLIP / 8 else right
        lines.append(f"{total}+{number}={found}")
        total = found
    return prompt, {"prompt": prompt, "completion": "\n".join([*lines, f"#### {total}"])}


def code_row(draw: random.Random, pairs: bool) -> tuple[str, Row]:
    """A function of one number with a docstring of two or three operations, and its body in one line."""
    asked = [(draw.choice(list(OPERATIONS)), draw.randint(2, 9)) for _ in range(draw.randint(2, 3))]
    words = ", then ".join(kind.format(number) for kind, number in asked)
    prompt = f'def f(x):\n    """{words[0].upper()}{words[1:]}."""\n'
    if not pairs:
        results = [(number, _run(asked, number)) for number in (0, 1, 5, 12, -3, 100)]
        checks = "\n".join(f"    assert candidate({number}) == {result}" for number, result in results)
        return prompt, {"prompt": prompt, "test": f"def check(candidate):\n{checks}\n", "entry_point": "f"}
    written = list(asked)
    if draw.random() < FORGOTTEN["code"][len(asked)]:
        written.pop(draw.randrange(len(written)))
    elif draw.random() < SLIP / 2:
        place = draw.randrange(len(written))
        kind, number = written[place]
        wrong = (draw.choice(list(OPERATIONS)), number) if draw.random() < 0.5 else (kind, draw.randint(2, 9))
        written[place] = wrong
    return prompt, {"prompt": prompt, "completion": f"    return {_expression(written)}"}


def _expression(operations: list[tuple[str, int]]) -> str:
    text = "x"
    for kind, number in operations:
        # A sum inside a product needs brackets, a call brings its own.
        inner = f"({text})" if " " in text and not text.startswith(("max", "min")) else text
        text = OPERATIONS[kind].format(inner, number)
    return text


def _run(operations: list[tuple[str, int]], value: int) -> int:
    """What the function gives; the one place where Python is asked, on expressions of our own."""
    return int(eval(_expression(operations), {"x": value, "max": max, "min": min}))


def conversation_row(draw: random.Random, pairs: bool) -> tuple[str, Row]:
    """Three turns in which a user tells of himself, one or two facts each, and a last one in which he asks for all of it."""
    name = draw.choice(NAMES)
    kinds = draw.sample(list(FACTS), draw.randint(3, 5))
    facts = [(kind, draw.choice(FACTS[kind][2].split())) for kind in kinds]
    cuts = sorted(draw.sample(range(1, len(facts)), 2))
    turns = [facts[: cuts[0]], facts[cuts[0] : cuts[1]], facts[cuts[1] :]]
    messages: list[dict[str, str]] = []
    for number, told in enumerate(turns):
        message = " ".join(FACTS[kind][0].format(value) for kind, value in told)
        heard = [FACTS[kind][1].format(value) for kind, value in told if not pairs or draw.random() >= SLIP]
        messages += [
            {"role": "user", "content": f"My name is {name}. {message}" if number == 0 else message},
            {"role": "assistant", "content": summary(name, heard)},
        ]
    messages.append({"role": "user", "content": ASK})
    key = repr((name, turns))
    columns = {"facts": [f"{kind}: {value}" for kind, value in facts], "name": name}
    if not pairs:
        return key, {"messages": messages, **columns}
    # What was said in the turn before is forgotten least: 1/4, 1/2 and 3/4 of the slips of the first turn.
    said = [
        FACTS[kind][1].format(value)
        for number, told in enumerate(turns)
        for kind, value in told
        if draw.random() >= SLIP * (3 - number) / 1.5
    ]
    draw.shuffle(said)
    return key, {"messages": [*messages, {"role": "assistant", "content": summary(name, said)}]}


def summary(name: str, said: list[str]) -> str:
    """``Mara is a baker and keeps a cat. Mara lives in Oslo.``"""
    parts = [said[start : start + 2] for start in range(0, len(said), 2)]
    return " ".join(f"{name} {' and '.join(part)}." for part in parts) or f"You are {name}."


MAKERS: dict[str, Callable[[random.Random, bool], tuple[str, Row]]] = {
    "steps": steps_row,
    "code": code_row,
    "conversation": conversation_row,
}
