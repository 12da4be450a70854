"""How surprised a fixed judge is by a text after another text: an answer after its prompt, the follow-up after both."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cagsr.config import ModelConfig
from cagsr.errors import ModelError
from cagsr.evaluation.intervals import Floats
from cagsr.flow import Prompt
from cagsr.models.architecture import architecture_of
from cagsr.models.continuation import encode_continuation
from cagsr.models.lengths import length_borders
from cagsr.models.load import LoadedModel, load_model
from cagsr.prompts.answer_text import answered_messages
from cagsr.prompts.chat import apply_template
from cagsr.prompts.references import prompt_words
from cagsr.reward.model import join_answer
from cagsr.support.progress import each

_LOGITS_AT_ONCE = 2**26
"""Numbers in one batch's logits (256 MiB as float32), so that a large vocabulary does not fill the memory."""


def perplexity(
    model: Any, tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], batch_size: int = 32
) -> Floats:
    """Perplexity of each answer given its prompt under a fixed judge, ``exp`` of the mean NLL per answer token.

    ``model`` is a decoder-only transformers model, used as it is but for the evaluation mode (restored afterwards). Returns
    ``(answers,)`` float64; NaN for an answer without tokens. Prompts and answers are put together as tokens
    (``models/continuation.py``), so that answers of any kind share the prompt's tokens. Raises ModelError for an
    encoder-decoder judge, a tokenizer that puts nothing before an empty prompt, or a text longer than the model's context.
    """
    return np.exp(mean_nll(model, tokenizer, prompts, answers, batch_size))


@torch.no_grad()
def mean_nll(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Sequence[str],
    batch_size: int = 32,
    *,
    templated: Sequence[bool] | None = None,
) -> Floats:
    """Mean negative log-likelihood per token of each answer given its prompt, nats; the logarithm of ``perplexity``.

    Arguments, result and errors as there. ``templated``: prompts that a chat template wrote hold their special tokens
    already, so none are added.
    """
    if not architecture_of(model.config).one_sequence:
        raise ModelError(f"{model.config.model_type} is an encoder-decoder model; take a decoder-only judge.")
    rows = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        special = templated is None or not templated[number]
        context = list(tokenizer(prompt, add_special_tokens=special)["input_ids"])
        if special and context and tokenizer.eos_token_id is not None and context[-1] == tokenizer.eos_token_id:
            context = context[:-1]  # some tokenizers close every text
        if not context:
            if tokenizer.bos_token_id is None:
                raise ModelError("the judge's tokenizer gives no token for an empty prompt; give each answer a prompt.")
            context = [tokenizer.bos_token_id]
        rows.append((context, encode_continuation(tokenizer, prompt, answer)))
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max((len(context) + len(answer) for context, answer in rows), default=0)
    if limit is not None and longest > limit:
        raise ModelError(f"an answer with its prompt has {longest} tokens, the judge reads {limit}; shorten it.")
    result = np.full(len(rows), np.nan)
    order = sorted(range(len(rows)), key=lambda number: sum(map(len, rows[number])))
    size = max(1, min(batch_size, _LOGITS_AT_ONCE // max(1, longest * model.config.get_text_config().vocab_size)))
    was_training = model.training
    model.eval()
    length_borders(model)
    try:
        for start in each("judging by perplexity", range(0, len(order), size), "batches"):
            chosen = order[start : start + size]
            result[chosen] = _batch_nll(model, [rows[number] for number in chosen])
    finally:
        model.train(was_training)
    return result


def _batch_nll(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> Floats:
    """Mean NLL ``(batch,)`` of right-padded rows; padding is masked, whatever id it has."""
    width = max(len(context) + len(answer) for context, answer in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    attended = torch.zeros_like(ids)
    judged = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, (context, answer) in enumerate(rows):
        end = len(context) + len(answer)
        ids[number, :end] = torch.tensor(context + answer)
        attended[number, :end] = 1
        judged[number, len(context) : end] = True
    ids, attended, judged = (tensor.to(model.device) for tensor in (ids, attended, judged))
    counted = judged[:, 1:]
    # (judged tokens, vocabulary)
    logits = model(input_ids=ids, attention_mask=attended).logits[:, :-1][counted].float()
    nll = torch.zeros(counted.shape, device=model.device)
    nll[counted] = torch.nn.functional.cross_entropy(logits, ids[:, 1:][counted], reduction="none")
    mean = nll.sum(1) / counted.sum(1)  # 0 / 0 is NaN, as promised
    return mean.double().cpu().numpy()


def follow_up_nll(
    judge: LoadedModel, prompts: Sequence[Prompt], answers: Sequence[str], follow_ups: Sequence[str | None]
) -> Floats:
    """Mean negative log-likelihood per token of each row's true follow-up, given prompt + answer, under the judge; nats.

    ``-1/n sum_i log p(f_i | prompt, answer, f_<i)`` over the n judge tokens of the follow-up alone; ``exp`` of it is the
    follow-up perplexity. An answer (it may be empty) that says what the follow-up builds on makes it likelier. A plain
    prompt, its answer and the follow-up are joined with single spaces (none where white space, or punctuation that takes
    none, is already there); the space before the follow-up is scored with its first token. A conversation goes through the
    judge's chat template, the follow-up as the user's next message, of which only the content is scored; without a template
    its messages are joined as plain text.

    Returns ``(answers,)`` float64, NaN where the follow-up is None or blank. Raises ModelError where the three together are
    longer than the judge's context, or its template can't render the chat.
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
    context = join_answer(prompt_words(prompt), answer).rstrip() or answer
    return context, join_answer(context, follow_up)[len(context) :]


def load_judge(path: str, device: torch.device | str) -> LoadedModel:
    """Load a judge model. Raises ModelError where it can't be loaded, or is an encoder-decoder model."""
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
