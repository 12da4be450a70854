"""Text to token ids with character offsets, and the cutting of prompts that are too long."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

from cagsr.errors import DataError, ModelError
from cagsr.flow import Prompt
from cagsr.models.hearing import Hearing
from cagsr.models.vision import NEEDS_IMAGE, ReadPrompt, Vision
from cagsr.prompts.character_ranges import cut, not_empty, overlaps


@dataclass(frozen=True)
class Tokens:
    """One text as tokens."""

    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    """Character range of each token in the text; empty ranges for tokens the tokenizer added."""
    special: tuple[bool, ...]
    """True for special tokens (BOS, EOS, chat markers), whether added or written in the text."""
    blank: tuple[bool, ...]
    """True for tokens that are white space only."""


@dataclass(frozen=True)
class TextEncoder:
    """A fast tokenizer, with offsets that can be trusted. ModelError for a slow tokenizer: it has no offsets."""

    tokenizer: Any
    _lost: dict[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "is_fast", False):
            raise ModelError(
                f"The tokenizer {type(self.tokenizer).__name__} can't say where its tokens lie in the text; use a "
                "model with a fast tokenizer (a tokenizer.json)."
            )

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder  # chat markers are often in no list of special tokens
        return frozenset(self.tokenizer.all_special_ids) | {number for number, one in added.items() if one.special}

    def encode(self, text: str, *, add_special_tokens: bool) -> Tokens:
        """Token ids of ``text`` and where each lies in it."""
        ids, offsets = self._call(text, add_special_tokens)
        offsets = self._mend(text, ids, offsets, add_special_tokens)
        if add_special_tokens:
            kept = once_special(text, ids, self.tokenizer)
            ids, offsets = ids[kept], offsets[kept]
        surfaces = self.tokenizer.convert_ids_to_tokens(ids)
        return Tokens(
            ids=tuple(ids),
            offsets=tuple(offsets),
            special=tuple(i in self._special_ids for i in ids),
            # A sentencepiece token ▁ that was put before the text lies, by its offsets, on the first character.
            blank=tuple(
                not surface.strip("▁ ") or not text[start:end].strip()
                for surface, (start, end) in zip(surfaces, offsets, strict=True)
            ),
        )

    def _call(self, text: str, add_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]:
        # verbose=False: transformers warns about texts above its own limit; ours is checked with a clear error.
        encoding = self.tokenizer(
            text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False
        )
        return list(encoding["input_ids"]), [(start, end) for start, end in encoding["offset_mapping"]]

    def _mend(
        self, text: str, ids: list[int], offsets: list[tuple[int, int]], add_special_tokens: bool
    ) -> list[tuple[int, int]]:
        """Right the offsets of tokenizers that drop characters they don't know (a BPE without unknown token or byte pieces).

        ``tokenizers`` then reports every later token too far left. The text without those characters gives the same ids and
        right offsets, which are then moved back.
        """
        lost = {character for character in set(text) if self._is_lost(character)}
        if not lost:
            return offsets
        keep = [index for index, character in enumerate(text) if character not in lost]
        shorter_ids, shorter = self._call("".join(text[index] for index in keep), add_special_tokens)
        if shorter_ids != ids:
            return offsets
        return [(keep[start], keep[end - 1] + 1) if end > start else (0, 0) for start, end in shorter]

    def _is_lost(self, character: str) -> bool:
        if character not in self._lost:
            with_it, without = (self._call(text, False)[0] for text in (f"a{character}a", "aa"))
            self._lost[character] = with_it == without
        return self._lost[character]


def once_special(text: str, ids: Sequence[int], tokenizer: Any) -> slice:
    """The part of ``ids`` without a BOS (EOS) that the tokenizer put beside one that ``text`` begins (ends) with."""
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    first = bool(bos) and text.startswith(bos) and list(ids[:2]) == [tokenizer.bos_token_id] * 2
    last = bool(eos) and text.endswith(eos) and list(ids[-2:]) == [tokenizer.eos_token_id] * 2 and len(ids) > 2
    return slice(int(first), len(ids) - int(last))


def encode_prompt(prompt: Prompt, encoder: TextEncoder) -> Tokens:
    """Encode a prompt as tokens.

    Plain text gets the special tokens the tokenizer adds by itself (BOS for Llama, EOS for T5, none for GPT-2), none of
    them a second time where the text has it already; text that a chat template rendered holds its own.
    """
    return encoder.encode(prompt.text, add_special_tokens=prompt.messages is None)


def encode_asked(
    prompt: Prompt, encoder: TextEncoder, vision: Vision | Hearing | None, where: str
) -> tuple[Prompt, Tokens, tuple[int, ...]]:
    """Encode a prompt as what the model is asked, with images or without: the prompt as it is read, its tokens, and at how many
    places the model holds each of its images.

    DataError, which ``where`` (file and row) opens, for a placeholder without an image, and where the model reads no prompt
    without one.
    """
    if isinstance(vision, Hearing):  # its tokenizer would put another opening before the prompt's own
        return prompt, encoder.encode(prompt.text, add_special_tokens=False), ()
    if prompt.images and vision is not None:
        return encode_images(prompt, encoder, vision, where)
    if vision is not None and vision.model_type in NEEDS_IMAGE:
        raise DataError(
            f"{where}: the prompt has no image, and a {vision.model_type} model takes none without; name it in the column "
            "'images'."
        )
    if vision is not None and vision.placeholder in prompt.text:
        raise DataError(
            f"{where}: the prompt has the placeholder {vision.placeholder} and no image; name its image in the column 'images', or "
            "take the placeholder out."
        )
    return prompt, encode_prompt(prompt, encoder), ()


def encode_images(
    prompt: Prompt, encoder: TextEncoder, vision: Vision, where: str
) -> tuple[Prompt, Tokens, tuple[int, ...]]:
    """Encode a prompt with images: the ids are the processor's, each placeholder expanded once, and stay as they are.

    Offsets count in ``Prompt.text``, where an image is one placeholder: all of its tokens lie there, and are the template's.
    The prompt's text is what the processor reads, which may put a BOS into it (mllama). Also gives at how many places the model
    holds each image. ModelError where the tokenizer makes other ids of that text than the processor did.
    """
    special = prompt.messages is None
    read = vision.read(prompt.text, prompt.images, special=special, where=where)
    prompt = _moved(prompt, read.text, encoder.tokenizer.bos_token or "")
    tokens = encoder.encode(read.expanded, add_special_tokens=special)
    if tokens.ids != read.ids:
        tokens = encoder.encode(read.expanded, add_special_tokens=False)
    if tokens.ids != read.ids:
        raise ModelError(
            f"{where}: the processor of {vision.path} makes other tokens of the prompt than its tokenizer of the same text, so "
            "that words can't be found among them; report it with the model's name."
        )
    held = tuple((one.start, one.end) for one in read.placeholders)
    offsets = tuple(_unexpanded(start, end, read) for start, end in tokens.offsets)
    template = tuple(sorted({*prompt.template, *held}))
    return replace(prompt, template=template), replace(tokens, offsets=offsets), read.counts


def _unexpanded(start: int, end: int, read: ReadPrompt) -> tuple[int, int]:
    """Characters of what was tokenised as those of the text in which an image is one placeholder."""
    moved = 0
    for one in read.placeholders:
        if end <= one.expanded_start:
            break
        if start < one.expanded_end:  # of the placeholder, and of the text beside it where a token reaches out of it
            before, after = max(0, one.expanded_start - start), max(0, end - one.expanded_end)
            return one.start - before, one.end + after
        moved = one.end - one.expanded_end
    return start + moved, end + moved


def _moved(prompt: Prompt, text: str, bos: str) -> Prompt:
    """A prompt whose text a processor has put something into: ``bos`` in one place, and perhaps more at its end."""
    if text == prompt.text:
        return prompt
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt.text, text, strict=False)))
    found = [
        (end, text.startswith(bos, place), place)
        for end in range(len(prompt.text), len(text) + 1)
        for place in range(alike + 1)
        if text[place + end - len(prompt.text) : end] == prompt.text[place:]
    ]
    end, _, cut_at = max(found)  # `<a><bos>` has `><bos` put in as well
    more = end - len(prompt.text)

    def moved(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        return tuple((start + more * (start >= cut_at), end + more * (end > cut_at)) for start, end in ranges)

    said = moved([(one.start, one.end) for one in prompt.spoken])
    return replace(
        prompt,
        text=text,
        template=not_empty((*moved(prompt.template), (cut_at, cut_at + more), (end, len(text)))),
        spans=None if prompt.spans is None else moved(prompt.spans),
        spoken=tuple(one._replace(start=start, end=end) for one, (start, end) in zip(prompt.spoken, said, strict=True)),
    )


def truncate_prompt(prompt: Prompt, tokens: Tokens, limit: int, where: str) -> tuple[Prompt, Tokens]:
    """Shorten a prompt to ``limit`` tokens by dropping its earliest tokens and keeping the end.

    Special tokens and the chat template stay (a conversation without its markers is no conversation): what goes is the
    earliest text. ``Prompt.text`` and its ranges are shortened with the tokens; ``Prompt.messages`` and the columns
    keep the row as it was. DataError where the template alone is longer than ``limit``.
    """
    surplus = len(tokens.ids) - limit
    droppable = [
        index
        for index, (start, end) in enumerate(tokens.offsets)
        if not tokens.special[index] and not (start < end and any(a <= start and end <= b for a, b in prompt.template))
    ]
    if surplus <= 0:
        return prompt, tokens
    if len(droppable) <= surplus:
        raise DataError(
            f"{where}: the special tokens and the chat template alone leave no room for the prompt within {limit} "
            "tokens; set --data.long_prompts drop, or allow longer prompts (--data.max_prompt_length)."
        )
    gone = set(droppable[:surplus])
    kept = [index for index in range(len(tokens.ids)) if index not in gone]
    # A character that two tokens share (byte pieces) stays when one of them stays.
    alive = [tokens.offsets[index] for index in kept]
    cuts = [tokens.offsets[index] for index in sorted(gone) if not overlaps(*tokens.offsets[index], alive)]
    places = [(one.start, one.end) for one in prompt.spoken]
    text, (template, spans, said, offsets) = cut(prompt.text, cuts, prompt.template, prompt.spans or (), places, alive)
    shorter = replace(
        prompt,
        text=text,
        template=not_empty(template),
        spans=None if prompt.spans is None else not_empty(spans),
        spoken=tuple(one._replace(start=start, end=end) for one, (start, end) in zip(prompt.spoken, said, strict=True)),
    )
    return shorter, Tokens(
        ids=tuple(tokens.ids[index] for index in kept),
        offsets=offsets,
        special=tuple(tokens.special[index] for index in kept),
        blank=tuple(tokens.blank[index] for index in kept),
    )
