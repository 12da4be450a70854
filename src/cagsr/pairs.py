"""Prompt-completion pairs as token ids and labels, exactly as a rollout will see the prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jinja2 import TemplateError

from cagsr.config import SalienceConfig, SftConfig
from cagsr.errors import ConfigError, DataError
from cagsr.flow import Prompt
from cagsr.progress import working
from cagsr.prompts.encode import TextEncoder, encode_prompt
from cagsr.prompts.load import load_rows
from cagsr.prompts.render import render_prompt

IGNORED = -100
"""Label of a token that is not learnt."""


@working("reading the pairs")
def encode_pairs(config: SftConfig, tokenizer: Any, max_length: int | None) -> tuple[list[dict[str, list[int]]], int]:
    """Read the pairs and encode each as ``{"input_ids", "labels"}``; prompt tokens have the label ``IGNORED``.

    Prompt and completion are tokenised apart, because in a rollout the prompt stands alone and the answer is written
    token by token after it. A plain completion gets the end token; a conversation gets what its chat template writes.

    Returns:
        The encoded pairs, and how many were dropped because they are longer than ``max_length`` tokens.

    Raises:
        DataError: a row without the prompt or completion column or with an empty one, a pair that is too long
            (unless ``long_pairs`` drops it), a chat template that can't render a conversation, no pair left.
        ConfigError: streaming, which a shuffled training set can't be.
    """
    if config.data.streaming:
        raise ConfigError(
            "--data.streaming: sft shuffles its pairs and reads them all; use --data.limit for large sets."
        )
    encoder, encoded, dropped = TextEncoder(tokenizer), list[dict[str, list[int]]](), 0
    for where, prompt in _prompts(config, tokenizer):
        prompt_ids = list(encode_prompt(prompt, encoder).ids)
        answer_ids = encode_answer(prompt, config.completion_column, encoder, where)
        length = len(prompt_ids) + len(answer_ids)
        if max_length is not None and length > max_length:
            if config.long_pairs == "error":
                raise DataError(
                    f"{where}: the pair is {length} tokens long, the limit is {max_length}; shorten it, raise "
                    "--max_length up to the model's context, or set --long_pairs drop."
                )
            dropped += 1
            continue
        encoded.append({"input_ids": prompt_ids + answer_ids, "labels": [IGNORED] * len(prompt_ids) + answer_ids})
    if not encoded:
        raise DataError(
            f"{config.data.path}: all {dropped} pairs are longer than {max_length} tokens and were dropped."
        )
    return encoded, dropped


def _prompts(config: SftConfig, tokenizer: Any) -> Iterator[tuple[str, Prompt]]:
    """Yield each row's place (file and row, for messages) and its prompt."""
    for row in load_rows(config.data):
        yield (
            f"{row.source}, row {row.number}",
            render_prompt(row.values, row.number, config.data, SalienceConfig(), tokenizer, source=row.source),
        )


def encode_answer(
    prompt: Prompt, column: str, encoder: TextEncoder, where: str, *, flag: str = "--completion_column"
) -> list[int]:
    """The tokens that follow the prompt's when it is answered with its column ``column``, the end token included.

    ``flag`` is what names the column, for messages.

    Raises:
        DataError: no such column, an empty answer, one that the chat template can't render; ``where`` opens the message.
    """
    text = _completion_text(prompt, column, encoder.tokenizer, where, flag)
    ids = list(encoder.encode(text, add_special_tokens=False).ids)
    if prompt.messages is None and ids[-1:] != [encoder.tokenizer.eos_token_id]:
        ids.append(encoder.tokenizer.eos_token_id)
    return ids


def _completion_text(prompt: Prompt, column: str, tokenizer: Any, where: str, flag: str) -> str:
    """Give the text that follows the prompt's text.

    For a conversation it is what the chat template adds when the answer's messages are put behind the prompt's.
    """
    if column not in prompt.columns:
        present = ", ".join(prompt.columns) or "none"
        raise DataError(
            f"{where}: no column '{column}' (columns besides the prompt: {present}); name the column that holds the "
            f"answer with {flag}."
        )
    answer = prompt.columns[column]
    if not answer or (isinstance(answer, str) and not answer.strip()):
        raise DataError(f"{where}: the completion (column '{column}') is empty; write one or remove the row.")
    if prompt.messages is None:
        if not isinstance(answer, str):
            raise DataError(f"{where}: the prompt is text, so column '{column}' must be text too.")
        return answer
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    if not isinstance(answer, list) or not all(isinstance(message, Mapping) for message in answer):
        raise DataError(f"{where}: column '{column}' must hold text or a list of chat messages.")
    messages = [dict(message) for message in (*prompt.messages, *answer)]
    try:
        whole = str(tokenizer.apply_chat_template(messages, tools=prompt.columns.get("tools") or None, tokenize=False))
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{where}: the tokenizer's chat template can't render the conversation ({error}).") from error
    if not whole.startswith(prompt.text):
        raise DataError(
            f"{where}: the chat template writes the prompt differently once an answer follows, so the answer can't be "
            "told apart; use a template that keeps the prompt as it is (see TRL's training chat templates)."
        )
    return whole[len(prompt.text) :]
