"""The quickstart's task: describe somebody or something so that every given fact is said.

A complete answer to ``Introduce this person. name: Mara; job: baker; city: Lisbon; hobby: chess; pet: parrot.`` says each
fact: ``Mara is a baker and lives in Lisbon. She enjoys chess and keeps a parrot.`` The training pairs are written by a hasty
annotator who leaves facts out and now and then repeats himself: that is what reinforcement learning is to mend. Which of the
three sets a prompt belongs to is decided by a hash of its facts, so they never meet, whatever the seeds.
"""

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

Part = Literal["pairs", "unlabelled", "held_out"]

DROP = 0.25
"""How often the annotator leaves a fact out."""
REPEAT = 0.15
"""How often he says one fact twice."""


@dataclass(frozen=True)
class Fact:
    """One kind of fact: its values, and the predicates that say it, with ``{}`` for the value, as in "lives in {}"."""

    values: tuple[str, ...]
    phrases: tuple[str, ...]


@dataclass(frozen=True)
class Subject:
    """One kind of thing to describe: first sentences of a prompt, name -> pronoun, kind -> fact."""

    instructions: tuple[str, ...]
    names: dict[str, str]
    facts: dict[str, Fact]


def _subject(said: dict[str, Any]) -> Subject:
    names = {name: pronoun for pronoun, names in said["names"].items() for name in names.split()}
    facts = {kind: Fact(tuple(one["values"].split()), tuple(one["phrases"])) for kind, one in said["facts"].items()}
    return Subject(tuple(said["instructions"]), names, facts)


_WORDS = yaml.safe_load(Path(__file__).with_name("task_words.yaml").read_text(encoding="utf-8"))
SUBJECTS = {name: _subject(said) for name, said in _WORDS.items()}


@dataclass(frozen=True)
class Item:
    """What a prompt asks about: a key of ``SUBJECTS``, and ``(kind of fact, value)`` as the prompt lists them."""

    subject: str
    instruction: str
    name: str
    facts: tuple[tuple[str, str], ...]

    def prompt(self) -> str:
        """Give the text that the model reads."""
        listed = "; ".join(f"{key}: {value}" for key, value in (("name", self.name), *self.facts))
        return f"{self.instruction} {listed}."

    def part(self) -> Part:
        """Tell which set this combination of facts belongs to; neither the order nor the instruction matters."""
        digest = hashlib.sha256(repr((self.name, sorted(self.facts))).encode()).digest()
        return ("pairs", "unlabelled", "held_out")[digest[0] % 3]


def make_pairs(n: int, seed: int) -> list[dict[str, str]]:
    """Make ``n`` rows ``{"prompt", "completion"}`` as the hasty annotator writes them; completions begin with a space."""
    rng = random.Random(f"pairs {seed}")
    rows = []
    for item in _items(n, "pairs", rng):
        said = [fact for fact in item.facts if rng.random() >= DROP] or [rng.choice(item.facts)]
        again = [rng.choice(said)] if rng.random() < REPEAT else []
        rows.append({"prompt": item.prompt(), "completion": f" {_tell(item, said, rng, again)}"})
    return rows


def make_prompts(n: int, seed: int, part: Part = "unlabelled") -> list[dict[str, str]]:
    """Make ``n`` different rows of prompts: ``{"prompt"}`` if unlabelled, held out with a complete ``"reference"``."""
    rng = random.Random(f"{part} {seed}")
    items = _items(n, part, rng)
    if part == "unlabelled":
        return [{"prompt": item.prompt()} for item in items]
    return [{"prompt": item.prompt(), "reference": _tell(item, item.facts, rng)} for item in items]


def read_prompt(prompt: str) -> dict[str, str]:
    """Give the facts listed in a prompt, the name included, as ``{kind: value}``; raises ValueError for another text."""
    facts = dict(re.findall(r"(\w+): (\w+)[;.]", prompt))
    if "name" not in facts:
        raise ValueError(f"no prompt of the quickstart task: {prompt!r}")
    return facts


def stated_facts(prompt: str, answer: str) -> list[tuple[str, str]]:
    """List the facts that an answer states in a known phrase, ``(kind, value)``, in order, repetitions included."""
    kinds = set(read_prompt(prompt))
    subject = next(name for name, one in SUBJECTS.items() if f"this {name}" in prompt or kinds <= {"name", *one.facts})
    # A name stands at the beginning of a sentence: elsewhere the same word may be another fact, as a chef.
    names = rf"(?:(?<=^)|(?<=\. )|(?<=^ ))(?:{'|'.join(SUBJECTS[subject].names)})\b"
    found = [(match.start(), "name", match.group()) for match in re.finditer(names, answer)]
    for kind, fact in SUBJECTS[subject].facts.items():
        value = f"({'|'.join(fact.values)})"
        for phrase in fact.phrases:
            pattern = rf"\b{re.escape(phrase).replace(re.escape('{}'), value)}\b"
            found += [(match.start(), kind, match.group(1)) for match in re.finditer(pattern, answer)]
    return [(kind, value) for _, kind, value in sorted(found)]


def facts_covered(prompt: str, answer: str) -> float:
    """Give the share of the prompt's facts (the name included) that the answer states, 0 to 1."""
    facts = read_prompt(prompt).items()
    return len(facts & set(stated_facts(prompt, answer))) / len(facts)


def wrong_facts(prompt: str, answer: str) -> int:
    """Count the different facts that the answer states and the prompt doesn't: wrong values and inventions."""
    return len(set(stated_facts(prompt, answer)) - read_prompt(prompt).items())


def facts_said_again(prompt: str, answer: str) -> int:
    """Count how often the answer states a fact that it has stated before, in whatever phrase; the name doesn't count."""
    stated = [(kind, value) for kind, value in stated_facts(prompt, answer) if kind != "name"]
    return len(stated) - len(set(stated))


def facts_metric(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """``facts_covered`` for many answers: the quickstart's held-out metric (``evaluation.metric``)."""
    return [facts_covered(prompt, answer) for prompt, answer in zip(prompts, completions, strict=True)]


def all_words() -> list[str]:
    """List every word, punctuation aside, that prompts and answers are made of, without duplicates."""
    texts = ["name", "and", "who", "also"]
    for subject in SUBJECTS.values():
        texts += [*subject.instructions, *subject.names, *subject.names.values(), *subject.facts]
        for fact in subject.facts.values():
            texts += [*fact.phrases, *fact.values]
    return list(dict.fromkeys(word for text in texts for word in re.findall(r"\w+", text)))


# ---- making ----


def _items(n: int, part: Part, rng: random.Random) -> Iterator[Item]:
    """Draw ``n`` items with different prompts that belong to ``part``."""
    seen: set[str] = set()
    while len(seen) < n:
        subject = rng.choice(list(SUBJECTS))
        known = SUBJECTS[subject]
        kinds = rng.sample(list(known.facts), rng.randint(4, 6))
        name = rng.choice(list(known.names))
        facts = tuple((kind, rng.choice(known.facts[kind].values)) for kind in kinds)
        item = Item(subject, rng.choice(known.instructions), name, facts)
        if item.part() == part and item.prompt() not in seen:
            seen.add(item.prompt())
            yield item


def _tell(
    item: Item, facts: Sequence[tuple[str, str]], rng: random.Random, again: Sequence[tuple[str, str]] = ()
) -> str:
    """Say the facts in sentences of one to three, in an order of the writer's own."""
    subject = SUBJECTS[item.subject]
    order = [*rng.sample(facts, len(facts)), *again]
    predicates = [rng.choice(subject.facts[kind].phrases).format(value) for kind, value in order]
    sentences: list[str] = []
    while predicates:
        size = min(len(predicates), rng.choice((1, 2, 2, 3)))
        part, predicates = predicates[:size], predicates[size:]
        who = item.name if not sentences else rng.choice((subject.names[item.name],) * 3 + (item.name,))
        listed = part[0] if size == 1 else f"{', '.join(part[:-1])} and {part[-1]}"
        sentences.append(f"{who} {listed}.")
    return " ".join(sentences)
