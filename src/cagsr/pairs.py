"""Prompt-completion pairs as token ids and labels, exactly as a rollout will see the prompts."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cagsr.config import SalienceConfig, SftConfig
from cagsr.errors import DataError
from cagsr.flow import EncodedPrompt, Prompt
from cagsr.models.architecture import Architecture
from cagsr.models.continuation import encode_continuation
from cagsr.models.decoder_only import DecoderOnly
from cagsr.models.stops import turn_end
from cagsr.models.vision import Vision
from cagsr.prompts.answer_text import text_after
from cagsr.prompts.encode import TextEncoder, encode_asked
from cagsr.prompts.load import load_rows
from cagsr.prompts.notes import about_form, about_messages
from cagsr.prompts.prepare import check_numbers
from cagsr.prompts.render import is_parts, messages_of, render_prompt, text_of
from cagsr.support.progress import working

IGNORED = -100
"""Label of a token that is not learnt."""


class Pair(NamedTuple):
    """Token ids of a prompt as a rollout reads it, and of what shall follow."""

    prompt: list[int]
    answer: list[int]
    seen: EncodedPrompt | None = None
    """The prompt with its images, which are opened when they are needed; None: it has none."""

    def one_sequence(self) -> dict[str, list[int]]:
        """As a decoder-only model learns it: prompt tokens have the label ``IGNORED``."""
        return {"input_ids": self.prompt + self.answer, "labels": [IGNORED] * len(self.prompt) + self.answer}


@working("reading the pairs")
def encode_pairs(
    config: SftConfig,
    tokenizer: Any,
    max_length: int | None,
    notes: list[str] | None = None,
    architecture: Architecture | None = None,
    vision: Vision | None = None,
) -> tuple[list[Pair], int]:
    """Read the pairs and encode each, prompts with images by ``vision`` (None: they are refused).

    The completion is encoded as what a rollout could write behind the prompt (``models/continuation.py``), an encoder-decoder's
    as a text of its own. A plain one gets the end token; a conversation's gets what its chat template writes, up to the token
    that ends the answer.

    What is worth saying about the rows is added to ``notes``. Gives the encoded pairs, and how many were dropped because they
    are longer than ``max_length`` tokens (None: no limit): prompt and answer together, of an encoder-decoder each of them.

    Raises:
        DataError: a row without the prompt or completion column or with an empty one, a pair that is too long
            (unless ``long_pairs`` drops it), a chat template that can't render a conversation, images that can't be read,
            no pair left.
    """
    architecture = architecture or DecoderOnly()
    encoder, encoded, dropped = TextEncoder(tokenizer), list[Pair](), 0
    prompts: list[Prompt] = []
    from_messages = False
    for row in load_rows(config.data, [config.completion_column]):
        where = f"{row.source}, row {row.number}"
        rendered = render_prompt(row, config.data, SalienceConfig(), tokenizer, vision)
        prompts.append(rendered)
        from_messages |= row.from_messages
        prompt, tokens, _ = encode_asked(rendered, encoder, vision, where)
        answer = encode_answer(rendered, config.completion_column, encoder, where, architecture, behind=prompt.text)
        if vision is not None and vision.token_id in answer:
            raise DataError(
                f"{where}: the answer holds an image's token, which no answer can; mend the row or remove it."
            )
        seen = EncodedPrompt(prompt, tokens.ids, (-1,) * len(tokens.ids), ()) if prompt.images else None
        pair = Pair(list(tokens.ids), answer, seen)
        lengths = {"prompt": len(pair.prompt), "answer": len(pair.answer)}
        if architecture.one_sequence:
            lengths = {"pair": sum(lengths.values())}
        part = max(lengths, key=lambda name: lengths[name])
        if max_length is not None and lengths[part] > max_length:
            if config.long_pairs == "error":
                raise DataError(
                    f"{where}: the {part} is {lengths[part]} tokens long, the limit is {max_length}; shorten it, raise "
                    "--max_length up to the model's context, or set --long_pairs drop."
                )
            dropped += 1
            continue
        encoded.append(pair)
    if not encoded:
        raise DataError(
            f"{config.data.path}: all {dropped} pairs are longer than {max_length} tokens and were dropped."
        )
    check_numbers([len(pair.seen.prompt.images) if pair.seen else 0 for pair in encoded], vision, config.data.path)
    if notes is not None:
        notes += [about_messages(config.data)] * from_messages + about_form(prompts, tokenizer)
    return encoded, dropped


def encode_answer(
    prompt: Prompt,
    column: str,
    encoder: TextEncoder,
    where: str,
    architecture: Architecture | None = None,
    behind: str | None = None,
) -> list[int]:
    """The tokens that follow the prompt's when it is answered with its column ``column``, the end token included.

    ``architecture`` None: a decoder-only model's. ``behind``: the prompt's text as the model reads it, where what reads images
    has put something into it.

    DataError for no such column, an empty answer, one that the chat template can't render.
    """
    tokenizer = encoder.tokenizer
    text = _completion_text(prompt, column, tokenizer, where)
    end = turn_end(tokenizer)
    if prompt.messages is not None and end is not None:
        text = end.cut(text)
    ids = encode_continuation(tokenizer, (architecture or DecoderOnly()).text_before(behind or prompt.text), text)
    # A conversation that is written out as text may end with the template's own token.
    ends = (tokenizer.eos_token_id, None if end is None else end.stop)
    if prompt.messages is None and (not ids or ids[-1] not in ends):
        ids.append(tokenizer.eos_token_id)
    return ids


def unending(answers: Sequence[Sequence[int]], stop_ids: Sequence[int]) -> tuple[str, ...]:
    """A sentence if there are answers whose last token ends no generation: nobody learns to end from them."""
    endless = sum(ids[-1] not in stop_ids for ids in answers)
    if not endless:
        return ()
    return (
        f"Careful: {endless:,} of {len(answers):,} answers end with no token that generation stops at, because the chat "
        "template writes none there; a model that learns from them says no end. Use a template that ends each turn with an "
        "end token (see TRL's training chat templates).",
    )


def _completion_text(prompt: Prompt, column: str, tokenizer: Any, where: str) -> str:
    """Give the text that follows the prompt's text; for a conversation it is what the chat template adds."""
    if column not in prompt.columns:
        present = ", ".join(prompt.columns) or "none"
        raise DataError(
            f"{where}: no column '{column}' (columns besides the prompt: {present}); name the column that holds the "
            "answer with --completion_column."
        )
    answer = prompt.columns[column]
    if prompt.messages is None and answer and not isinstance(answer, str) and not is_parts(answer):
        raise DataError(f"{where}: the prompt is text, so column '{column}' must be text too.")
    said = _said(answer, f"{where}: column '{column}'")
    if not said:
        raise DataError(f"{where}: the completion (column '{column}') is empty; write one or remove the row.")
    if isinstance(said, str):
        if prompt.messages is None:
            return said
        said = ({"role": "assistant", "content": said},)
    return text_after(prompt, said, tokenizer, where)


def _said(answer: Any, where: str) -> str | tuple[dict[str, Any], ...]:
    """An answer as text, or as chat messages with their contents as text; empty if it says nothing."""
    if isinstance(answer, str) or is_parts(answer):
        text = text_of(answer, where)
        return text if text.strip() else ""
    if not answer:
        return ""
    if not isinstance(answer, list) or not all(isinstance(message, Mapping) for message in answer):
        raise DataError(f"{where} must hold text or a list of chat messages.")
    messages = messages_of(answer, where)
    # A message without text may hold something else that a template writes, as a tool call.
    said = any((one["content"] or "").strip() or one.keys() - {"role", "content"} for one in messages)
    return messages if said else ()
