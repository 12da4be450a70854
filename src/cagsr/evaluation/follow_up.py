"""Follow-up perplexity: does an answer prepare for what really came next, in the eyes of a fixed judge model?

The judge reads prompt and answer and is then measured on the row's true follow-up. An answer that says what the follow-up
builds on makes it likelier. The judge's weights never change and have no part in the reward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from cagsr.config import ModelConfig
from cagsr.errors import ModelError
from cagsr.evaluation.perplexity import mean_nll
from cagsr.flow import Prompt
from cagsr.models.load import LoadedModel, load_model
from cagsr.prompts.answer_text import answered_messages
from cagsr.prompts.chat import apply_template
from cagsr.reward.model import join_answer

Floats = NDArray[np.float64]


def follow_up_nll(
    judge: LoadedModel, prompts: Sequence[Prompt], answers: Sequence[str], follow_ups: Sequence[str | None]
) -> Floats:
    """Mean negative log-likelihood per token of each follow-up, given prompt + answer, under the judge; nats.

    ``-1/n sum_i log p(f_i | prompt, answer, f_<i)`` over the n judge tokens of the follow-up alone; ``exp`` of it is the
    follow-up perplexity. A plain prompt, its answer and the follow-up are joined with single spaces (none where white
    space, or punctuation that takes none, is already there); the space before the follow-up is scored with its first
    token. A conversation goes through the judge's chat template, the follow-up as the user's next message, of which only the
    content is scored; without a template its messages are joined as plain text.

    Args:
        judge: decoder-only.
        prompts: one for each answer.
        answers: empty ones are allowed: the follow-up is then given the prompt alone.
        follow_ups: None where the row has none.

    Returns:
        ``(answers,)`` float64, NaN where there is no follow-up.

    Raises:
        ModelError: the three together are longer than the judge's context, or its template can't render the chat.
    """
    result = np.full(len(answers), np.nan)
    chosen = [number for number, text in enumerate(follow_ups) if text is not None and text.strip()]
    pairs = [_context(judge, prompts[n], answers[n], str(follow_ups[n]).strip()) for n in chosen]
    templated = [prompts[n].messages is not None and judge.tokenizer.chat_template is not None for n in chosen]
    try:
        with judge.autocast():
            contexts, texts = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            result[chosen] = mean_nll(judge.model, judge.tokenizer, contexts, texts, templated=templated)
    except ModelError as error:
        raise ModelError(
            f"--judge_model {judge.path}: {error} (its context must hold prompt, answer and follow-up)"
        ) from error
    return result


def _context(judge: LoadedModel, prompt: Prompt, answer: str, follow_up: str) -> tuple[str, str]:
    """What the judge reads and what it is measured on."""
    if prompt.messages is not None and judge.tokenizer.chat_template is not None:
        answered = answered_messages(prompt.messages, [{"role": "assistant", "content": answer}])
        chat = [*answered, {"role": "user", "content": follow_up}]
        try:
            text = apply_template(chat, judge.tokenizer, prompt.columns, f"row {prompt.row}", opened=False)
        except Exception as error:  # a template is a program and can raise anything
            raise ModelError(
                f"--judge_model {judge.path}: its chat template can't render row {prompt.row} with answer and follow-up "
                f"({error})."
            ) from error
        start = text.rfind(follow_up)
        if start >= 0:
            return text[:start], follow_up
    words = prompt.text if prompt.messages is None else "\n".join(one["content"] or "" for one in prompt.messages)
    context = join_answer(words, answer).rstrip() or answer
    return context, join_answer(context, follow_up)[len(context) :]


def load_judge(path: str, device: torch.device | str) -> LoadedModel:
    """Load a judge model.

    Raises:
        ModelError: it can't be loaded, or is an encoder-decoder model.
    """
    try:
        loaded = load_model(ModelConfig(path, device="cpu"), for_training=False)
    except ModelError as error:
        raise ModelError(str(error).replace("--model.path", "--judge_model")) from error
    if not loaded.architecture.one_sequence:
        raise ModelError(
            f"--judge_model {path}: is an encoder-decoder model; a judge must be decoder-only, so that prompt, answer and "
            "follow-up are one text."
        )
    return dataclasses.replace(loaded, device=torch.device(device), model=loaded.model.to(device))
