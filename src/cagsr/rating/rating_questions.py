"""What people are asked: two answers to one prompt, read from files of answers, of pairs, or of known pairs (gold)."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cagsr.config import DataConfig
from cagsr.errors import DataError
from cagsr.prompts.load import Row, load_rows

PromptText = str | list[dict[str, str]]
"""A prompt as it is shown and exported: text, or chat messages of role and content."""


@dataclass(frozen=True)
class RatingQuestion:
    """Two answers to a prompt; of a gold question, a check with a known answer, A is the better one."""

    prompt: PromptText
    a: str
    b: str
    gold: bool = False

    @property
    def id(self) -> str:
        """Name of the question, made from its content: the same files give the same names."""
        content = json.dumps([self.prompt, self.a, self.b, self.gold], ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class RatingQuestions:
    """The questions of some files, and how many were left out of them (:meth:`notes` says why)."""

    questions: tuple[RatingQuestion, ...]
    equal: int = 0
    repeated: int = 0
    unpaired: int = 0

    def notes(self) -> list[str]:
        """Say in plain sentences what was left out."""
        said = {
            "pairs have two equal answers: they are not asked and count nowhere.": self.equal,
            "pairs repeat an earlier one word for word: each is asked once.": self.repeated,
            "answers have no partner (one side has more for their prompt): left out.": self.unpaired,
        }
        return [f"{count:,} {what}" for what, count in said.items() if count]


def questions_from_answers(
    a: str, b: str, *, prompt_column: str = "prompt", response_column: str = "completion"
) -> RatingQuestions:
    """Pair two files of answers by prompt; the first answer of A with the first of B, and so on.

    Both are as ``cagsr generate`` writes them, several rows of one prompt being its samples. Raises DataError for a row
    without prompt or answer, or a prompt that only one of the files answers.
    """
    mine = _answers(a, prompt_column, response_column)
    theirs = _answers(b, prompt_column, response_column)
    for name, other, (first, second) in ((a, b, (mine, theirs)), (b, a, (theirs, mine))):
        lacking = next((key for key in first if key not in second), None)
        if lacking is not None:
            row, *_ = first[lacking][0]
            raise DataError(
                f"{name}, row {row}: its prompt is not answered in {other}; both files must answer the same prompts."
            )
    pairs = []
    unpaired = 0
    for key, rows in mine.items():
        others = theirs[key]
        unpaired += abs(len(rows) - len(others))
        pairs += [RatingQuestion(prompt, a, b) for (_, prompt, a), (*_, b) in zip(rows, others, strict=False)]
    return kept_questions(pairs, unpaired)


def questions_from_pairs(
    path: str, a_column: str, b_column: str, *, prompt_column: str = "prompt", gold: bool = False
) -> RatingQuestions:
    """Read a file whose rows have a prompt and both answers; raises DataError for a row without one of the columns."""
    rows = load_rows(DataConfig(path=path, prompt_column=prompt_column), [a_column, b_column])
    pairs = [
        RatingQuestion(prompt_of(row, prompt_column), _text(row, a_column), _text(row, b_column), gold) for row in rows
    ]
    return kept_questions(pairs, 0)


def with_gold(asked: RatingQuestions, gold: RatingQuestions) -> RatingQuestions:
    """Put questions and gold questions into one set."""
    left_out = (asked.equal + gold.equal, asked.repeated + gold.repeated, asked.unpaired + gold.unpaired)
    return RatingQuestions((*asked.questions, *gold.questions), *left_out)


def prompt_of(row: Row, column: str = "prompt") -> PromptText:
    """Read a row's prompt: text, or chat messages ``{"role", "content"}`` whose contents are text or parts of text.

    Raises DataError, with file and row, where it is missing, empty, or something else.
    """
    where = f"{row.source}, row {row.number}"
    value = row.values.get(column)
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        return [_message(entry, position, where) for position, entry in enumerate(value, start=1)]
    if value is None or isinstance(value, str):
        present = ", ".join(map(str, row.values)) or "none"
        raise DataError(
            f"{where}: no prompt in column '{column}' (columns here: {present}); name the column with --prompt_column."
        )
    raise DataError(f'{where}: column \'{column}\' must hold text or chat messages {{"role": ..., "content": ...}}.')


def _answers(path: str, prompt_column: str, response_column: str) -> dict[str, list[tuple[int, PromptText, str]]]:
    """A file's answers under their prompts, in the order of these: number of the row, prompt, answer."""
    found: dict[str, list[tuple[int, PromptText, str]]] = {}
    for row in load_rows(DataConfig(path=path, prompt_column=prompt_column), [response_column]):
        prompt = prompt_of(row, prompt_column)
        found.setdefault(json.dumps(prompt, sort_keys=True), []).append(
            (row.number, prompt, _text(row, response_column, "--response_column"))
        )
    return found


def _text(row: Row, column: str, flag: str | None = None) -> str:
    """One answer as text. An empty one is an answer too: models give them."""
    from cagsr.prompts.render import text_of

    where = f"{row.source}, row {row.number}"
    value = row.values.get(column)
    if value is None:
        present = ", ".join(map(str, row.values)) or "none"
        raise DataError(
            f"{where}: no answer in column '{column}' (columns here: {present})"
            + (f"; name the column with {flag}." if flag else "; each row needs a prompt and both answers.")
        )
    return text_of(value, f"{where}: column '{column}'")


def _message(entry: Any, position: int, where: str) -> dict[str, str]:
    from cagsr.prompts.render import content_of

    message = entry if isinstance(entry, Mapping) else {}
    role, content = message.get("role"), content_of(message.get("content"))
    if not isinstance(role, str) or content is None:
        raise DataError(f"{where}: message {position} of the prompt needs a role and a content that are text.")
    return {"role": role, "content": content}


def kept_questions(pairs: Sequence[RatingQuestion], unpaired: int) -> RatingQuestions:
    """Leave out pairs that nobody could tell apart (white space is not what is judged) and those that came before."""
    different = [pair for pair in pairs if pair.a.split() != pair.b.split()]
    first: dict[str, RatingQuestion] = {}
    for pair in different:
        first.setdefault(pair.id, pair)
    return RatingQuestions(tuple(first.values()), len(pairs) - len(different), len(different) - len(first), unpaired)
