"""How surprised a fixed judge is by a text after another text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cagsr.errors import ModelError
from cagsr.models.architecture import architecture_of
from cagsr.models.continuation import encode_continuation
from cagsr.models.lengths import length_borders
from cagsr.support.progress import each

Floats = NDArray[np.float64]

_LOGITS_AT_ONCE = 2**26
"""Numbers in one batch's logits (256 MiB as float32), so that a large vocabulary does not fill the memory."""


def perplexity(
    model: Any, tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], batch_size: int = 32
) -> Floats:
    """Perplexity of each answer given its prompt under a fixed judge, ``exp`` of the mean NLL per answer token.

    ``model`` is a decoder-only transformers model, used as it is but for the evaluation mode (restored afterwards).
    Returns ``(answers,)`` float64; NaN for an answer without tokens. Prompts and answers are put together as
    tokens (``models/continuation.py``), so that answers of any kind share the prompt's tokens.

    Raises ModelError for an encoder-decoder judge, a tokenizer that puts nothing before an empty prompt, or a text
    longer than the model's context.
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
    logits = (
        model(input_ids=ids, attention_mask=attended).logits[:, :-1][counted].float()
    )  # (judged tokens, vocabulary)
    nll = torch.zeros(counted.shape, device=model.device)
    nll[counted] = torch.nn.functional.cross_entropy(logits, ids[:, 1:][counted], reduction="none")
    mean = nll.sum(1) / counted.sum(1)  # 0 / 0 is NaN, as promised
    return mean.double().cpu().numpy()
