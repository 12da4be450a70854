"""Machine-made rejected answers: a right answer with one mistake in it, from nothing but other pairs of the same file.

Nothing here knows a task. Clauses end at punctuation and, in English, begin at common connecting words; values are what
stands at one place of two prompts, found by aligning them.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import SequenceMatcher
from typing import Any

from cagsr.config import CorruptionConfig
from cagsr.errors import DataError
from cagsr.prompts.character_ranges import outside
from cagsr.prompts.find_words import find_words
from cagsr.prompts.render import is_parts, text_of

_TRIES = 40
"""Other pairs that are looked at for a fact to take from."""
_CLAUSE = re.compile(
    r"(?<=[.!?;:,])\s+|\s+(?=(?:and|but|or|which|who|that|with|where|while|because|although|in|on|at|near|by|for|from)\b)",
    re.IGNORECASE,
)
_SENTENCE_END = ".!?"


@dataclass(frozen=True)
class SupervisedPair:
    """A prompt and a right answer, text or chat messages each."""

    prompt: Any
    completion: Any
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What belongs to the prompt beside it: its tools, what its chat template is told."""

    @property
    def question(self) -> str:
        """The prompt as text."""
        return text_of(self.prompt)

    @property
    def answer(self) -> str:
        """The answer as text, without white space at its ends."""
        return text_of(self.completion).strip()


def synthesize(
    pairs: Sequence[SupervisedPair], weights: CorruptionConfig, seed: int, count: int | None = None
) -> tuple[list[dict[str, Any]], int]:
    """Make preference rows ``{"prompt", "chosen", "rejected", "corruption"}``: chosen is the pair's answer as it is.

    The others of ``pairs`` give the facts that are swapped and invented; ``weights`` say how often each kind of mistake is
    made. The pairs are gone through in random order as often as ``count`` rows take; None: one a pair. Gives the rows, and how
    many tries found no mistake to make (answers of a word or two); DataError where no pair allows any.
    """
    kinds = asdict(weights)
    generator = random.Random(seed)
    made: list[dict[str, Any]] = []
    seen: set[tuple[str, str]] = set()
    failed = 0
    wanted = len(pairs) if count is None else count
    while len(made) < wanted:
        before = len(made)
        for index in generator.sample(range(len(pairs)), len(pairs)):
            row = _corrupted(pairs[index], pairs, kinds, generator, seen)
            if row is None:
                failed += 1
            else:
                made.append(row)
            if len(made) == wanted:
                break
        if not made:
            raise DataError("No pair allows a mistake: the answers are too short, or all prompts are the same.")
        if len(made) == before or count is None:
            break
    return made, failed


def _corrupted(
    pair: SupervisedPair,
    pairs: Sequence[SupervisedPair],
    weights: dict[str, float],
    generator: random.Random,
    seen: set[tuple[str, str]],
) -> dict[str, Any] | None:
    """One row, of a kind drawn by weight among those that this pair allows; None where none is left."""
    left = {kind: weight for kind, weight in weights.items() if weight > 0}
    while left:
        kind = generator.choices(list(left), list(left.values()))[0]
        rejected = KINDS[kind](pair, pairs, generator)
        key = (pair.question + "\0" + pair.answer, _plain(rejected or ""))
        if rejected is not None and _plain(rejected) != _plain(pair.answer) and key not in seen:
            seen.add(key)
            row = {"prompt": pair.prompt, "chosen": pair.completion, "rejected": _in_form_of(pair.completion, rejected)}
            return {**pair.columns, **row, "corruption": kind}
        del left[kind]
    return None


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(_SENTENCE_END)


def _in_form_of(completion: Any, text: str) -> Any:
    """Write ``text`` as ``completion`` is written: with its white space in front, in parts, or as the message it is."""
    if isinstance(completion, str):
        return completion[: len(completion) - len(completion.lstrip())] + text
    if is_parts(completion):
        return [{"type": "text", "text": text}]
    return [*completion[:-1], {**completion[-1], "content": text}]


def clauses(text: str) -> list[tuple[int, int]]:
    """Character ranges of the clauses of a text, in order, without the white space between them."""
    return list(outside(len(text), [match.span() for match in _CLAUSE.finditer(text)]))


def _keys(text: str) -> list[str]:
    return [word.key for word in find_words(text)]


def _drop(pair: SupervisedPair, pairs: Sequence[SupervisedPair], generator: random.Random) -> str | None:
    """Leave out a clause, one with a word of the prompt if there is one."""
    text, asked = pair.answer, set(_keys(pair.question))
    parts = [part for part in clauses(text) if len(_keys(text[slice(*part)])) > 1]
    told = [part for part in parts if asked & set(_keys(text[slice(*part)])) and part[0] > 0]
    if len(clauses(text)) < 2 or not parts:
        return None
    start, end = generator.choice(told or parts)
    removed = text[start:end]
    before, after = text[:start].rstrip(), text[end:].lstrip()
    if removed[-1] in _SENTENCE_END and before and before[-1] not in _SENTENCE_END:
        before = before.rstrip(",;:") + removed[-1]
    return f"{before} {after}".strip()


def _swap(pair: SupervisedPair, pairs: Sequence[SupervisedPair], generator: random.Random) -> str | None:
    """Say another prompt's value in place of the prompt's.

    The two prompts are aligned word by word; where they differ, each has a value of its own. Both values must be said by
    their own answers, so that what is put in is something people say.
    """
    for other in _others(pair, pairs, generator):
        swaps = []
        for old, new in _differences(pair.question, other.question):
            found = _find(old, pair.answer)
            if found is not None and _find(new, other.answer) is not None and _find(new, pair.question) is None:
                swaps.append((found, new))
        if swaps:
            (start, end), new = generator.choice(swaps)
            return pair.answer[:start] + new + pair.answer[end:]
    return None


def _differences(first: str, second: str) -> list[tuple[str, str]]:
    """What two texts have at the same places: pairs of passages, cut from the texts."""
    words, others = list(find_words(first)), list(find_words(second))
    blocks = SequenceMatcher(None, [w.key for w in words], [w.key for w in others], autojunk=False).get_opcodes()
    return [
        (first[words[a].start : words[b - 1].end], second[others[c].start : others[d - 1].end])
        for kind, a, b, c, d in blocks
        if kind == "replace"
    ]


def _find(passage: str, text: str) -> tuple[int, int] | None:
    """Where a text has a passage as whole words, whatever the case."""
    match = re.search(rf"(?<!\w){re.escape(passage)}(?!\w)", text, re.IGNORECASE)
    return None if match is None else match.span()


def _invent(pair: SupervisedPair, pairs: Sequence[SupervisedPair], generator: random.Random) -> str | None:
    """Put in a clause of another answer that says something of *its* prompt which this prompt and answer lack."""
    text = pair.answer
    known = set(_keys(pair.question)) | set(_keys(text))
    for other in _others(pair, pairs, generator):
        theirs = set(_keys(other.question)) - known
        found = [other.answer[slice(*part)].strip(" .,;:!?") for part in clauses(other.answer)[1:]]
        found = [clause for clause in found if len(_keys(clause)) > 1 and theirs & set(_keys(clause))]
        if found:
            clause = generator.choice(found)
            # After a clause that doesn't end a sentence, or before the last full stop.
            ends = [end for _, end in clauses(text) if text[end - 1] not in _SENTENCE_END]
            if text[-1] in _SENTENCE_END:
                ends.append(len(text) - 1)
            position = generator.choice(ends or [len(text)])
            return f"{text[:position]} {clause}{text[position:]}"
    return None


def _repeat(pair: SupervisedPair, pairs: Sequence[SupervisedPair], generator: random.Random) -> str | None:
    """Say a phrase of two to six words twice in a row."""
    words = list(find_words(pair.answer))
    if len(words) < 2:
        return None
    length = generator.randint(2, min(6, len(words)))
    first = generator.randint(0, len(words) - length)
    start, end = words[first].start, words[first + length - 1].end
    return f"{pair.answer[:end]} {pair.answer[start:]}"


def _truncate(pair: SupervisedPair, pairs: Sequence[SupervisedPair], generator: random.Random) -> str | None:
    """Break off after a third to nine tenths of the words."""
    words = list(find_words(pair.answer))
    if len(words) < 3:
        return None
    kept = generator.randint(max(1, len(words) // 3), max(1, len(words) * 9 // 10))
    return pair.answer[: words[min(kept, len(words) - 1) - 1].end]


def _other(pair: SupervisedPair, pairs: Sequence[SupervisedPair], generator: random.Random) -> str | None:
    """Another prompt's answer."""
    return next((other.answer for other in _others(pair, pairs, generator)), None)


def _others(pair: SupervisedPair, pairs: Sequence[SupervisedPair], generator: random.Random) -> list[SupervisedPair]:
    """Some pairs of other prompts, in random order."""
    drawn = generator.sample(range(len(pairs)), min(_TRIES, len(pairs)))
    return [pairs[index] for index in drawn if pairs[index].question != pair.question]


KINDS: dict[str, Callable[[SupervisedPair, Sequence[SupervisedPair], random.Random], str | None]] = {
    "drop": _drop,
    "swap": _swap,
    "invent": _invent,
    "repeat": _repeat,
    "truncate": _truncate,
    "other": _other,
}
"""Kind -> the wrong answer it makes of a pair, None where it can't."""
