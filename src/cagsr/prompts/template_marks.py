"""Plain prompts that hold a chat template's marks already: somebody rendered them before they were written to the file."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import regex

from cagsr.errors import DataError
from cagsr.prompts.character_ranges import Range
from cagsr.prompts.chat import apply_template

_HOLDER = "\ue000"
_CONVERSATIONS = (("user",), ("system", "user"), ("user", "assistant", "user"))


class _Marks(NamedTuple):
    found: Any
    """Finds every mark: the template's own words, the tokenizer's special tokens, and a role on the line that one begins."""
    special: frozenset[str]
    bos: str | None


def written_marks(text: str, tokenizer: Any) -> tuple[Range, ...]:
    """Character ranges of a plain prompt that hold special tokens, or what the tokenizer's chat template writes.

    They are no words of the prompt: ``user`` in ``<|im_start|>user`` says nothing that an answer could look at.
    """
    marks = _marks(tokenizer, getattr(tokenizer, "chat_template", None))
    return () if marks is None else tuple(match.span() for match in marks.found.finditer(text))


def is_rendered(text: str, tokenizer: Any) -> bool:
    """Whether a plain prompt went through a chat template already, or begins with the BOS token as text."""
    marks = _marks(tokenizer, getattr(tokenizer, "chat_template", None))
    if marks is None:
        return False
    begun = marks.bos is not None and text.startswith(marks.bos)
    return begun or any(match.group() not in marks.special for match in marks.found.finditer(text))


@lru_cache(maxsize=8)
def _marks(tokenizer: Any, chat_template: Any) -> _Marks | None:
    """The marks of a tokenizer; ``chat_template`` is part of the key, for one that is replaced."""
    if tokenizer is None:
        return None
    special = {one.content for one in tokenizer.added_tokens_decoder.values() if one.special}
    special = {one for one in (*special, *tokenizer.all_special_tokens) if not one.strip().isalnum() and one.strip()}
    bos = tokenizer.bos_token
    template: set[str] = set()
    for roles in _CONVERSATIONS if chat_template is not None else ():
        messages = [{"role": role, "content": _HOLDER} for role in roles]
        try:
            text = apply_template(messages, tokenizer, {}, "", opened=True)
        except DataError:  # some templates know no system message
            continue
        for piece in text.split(_HOLDER):
            # A file may hold the text without its BOS; a role stands behind a special token.
            heads = [] if not special else regex.findall(r"\L<special>\w+", piece, special=special)
            template |= {piece.strip(), piece.removeprefix(bos or "").strip(), *heads}
    # A template may write plain words ("User: "), which prompts hold too: only what can't be one counts.
    template = {one for one in template - special if any(mark in one for mark in special) or set(one) & set("<[|{")}
    if not template and not special:
        return None
    # A base model's tokenizer has no template, but often the tokens of its sibling's: <start_of_turn>user.
    openers = special - {bos, tokenizer.eos_token, tokenizer.pad_token}
    return _Marks(
        regex.compile(r"\L<openers>\w+(?=\n)|\L<marks>", openers=openers, marks=template | special),
        frozenset(special),
        bos,
    )
