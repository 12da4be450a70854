"""Measures of finished answers, as pure functions that share nothing with the reward.

The texts come first, then the statistics: a mean or a paired difference is only reported with its interval.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from cagsr.errors import ModelError

_WORD = re.compile(r"\w+(?:['’-]\w+)*")

Floats = NDArray[np.float64]


def words(text: str) -> list[str]:
    """The words of a text, lower case, punctuation dropped; hyphens and apostrophes stay inside words."""
    return _WORD.findall(text.lower())


def rouge_l(text: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 (Lin, 2004), the best over the references, with Porter stemming; between 0 and 1.

    Raises ValueError without references.
    """
    if not references:
        raise ValueError("rouge_l needs at least one reference")
    scorer = _rouge_scorer()
    return max(scorer.score(reference, text)["rougeL"].fmeasure for reference in references)


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def repetition(text: str, n: int = 3) -> float:
    """Share of an answer's word n-grams that it has said before, ``1 - distinct / all``; 0 below n words."""
    grams = _ngrams(words(text), n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(texts: Iterable[str], n: int = 2) -> float:
    """distinct-n (Li et al., 2016, section 5): different word n-grams of the set over all of them; 0 where none."""
    grams = [gram for text in texts for gram in _ngrams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def length_in_words(text: str) -> int:
    """Words of a text."""
    return len(words(text))


def length_in_tokens(text: str, tokenizer: Any) -> int:
    """Tokens of a text under ``tokenizer``, special tokens not counted."""
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def word_weights(prompts: Sequence[str], floor: float = 0.1) -> dict[str, float]:
    """How much each word of a prompt set tells: ``log(prompts / prompts with the word)``, at most ``log(prompts)``.

    Words whose weight is below ``floor`` of the largest weigh nothing: a template's words, and most function words.
    A set in which every prompt has the same words (a single prompt, too) weighs them all 1.
    """
    counts = Counter(word for prompt in prompts for word in set(words(prompt)))
    weights = {word: math.log(len(prompts) / count) for word, count in counts.items()}
    largest = max(weights.values(), default=0.0)
    if largest == 0.0:
        return dict.fromkeys(weights, 1.0)
    return {word: weight if weight >= floor * largest else 0.0 for word, weight in weights.items()}


def lexical_relevance(prompt: str, answer: str, weights: Mapping[str, float] | None = None) -> float:
    """Weighted share of the prompt's words that the answer uses; between 0 and 1, 0 where no word has weight.

    ``weights`` come from ``word_weights`` over the prompt set; without them every word counts 1. A word that the set
    doesn't have counts as its largest weight.
    """
    wanted = set(words(prompt))
    unknown = max(weights.values(), default=1.0) if weights else 1.0
    weight = {word: weights.get(word, unknown) if weights is not None else 1.0 for word in wanted}
    total = sum(weight.values())
    said = set(words(answer))
    return sum(value for word, value in weight.items() if word in said) / total if total else 0.0


@torch.no_grad()
def perplexity(
    model: Any, tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], batch_size: int = 32
) -> Floats:
    """Perplexity of each answer given its prompt under a fixed judge, ``exp`` of the mean NLL per answer token.

    ``model`` is a decoder-only transformers model, used as it is but for the evaluation mode (restored afterwards).
    Returns ``(answers,)`` float64; NaN for an answer without tokens. Prompts and answers are put together as
    tokens, so that answers of any kind share the prompt's tokens.

    Raises ModelError for an encoder-decoder judge, a tokenizer that puts nothing before an empty prompt, or a text
    longer than the model's context.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{model.config.model_type} is an encoder-decoder model; take a decoder-only judge.")
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        context = list(tokenizer(prompt)["input_ids"])
        if context and tokenizer.eos_token_id is not None and context[-1] == tokenizer.eos_token_id:
            context = context[:-1]  # some tokenizers close every text
        if not context:
            if tokenizer.bos_token_id is None:
                raise ModelError("the judge's tokenizer gives no token for an empty prompt; give each answer a prompt.")
            context = [tokenizer.bos_token_id]
        rows.append((context, list(tokenizer(answer, add_special_tokens=False)["input_ids"])))
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max((len(context) + len(answer) for context, answer in rows), default=0)
    if limit is not None and longest > limit:
        raise ModelError(f"an answer with its prompt has {longest} tokens, the judge reads {limit}; shorten it.")
    result = np.full(len(rows), np.nan)
    order = sorted(range(len(rows)), key=lambda number: sum(map(len, rows[number])))
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            result[chosen] = _batch_perplexity(model, [rows[number] for number in chosen])
    finally:
        model.train(was_training)
    return result


def _batch_perplexity(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> Floats:
    """Perplexities ``(batch,)`` of right-padded rows; padding is masked, whatever id it has."""
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
    logits = model(input_ids=ids, attention_mask=attended).logits[:, :-1].float()
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")  # (batch, width - 1)
    counted = judged[:, 1:]
    mean = (nll * counted).sum(1) / counted.sum(1)  # 0 / 0 is NaN, as promised
    return mean.exp().double().cpu().numpy()


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean_interval(values: ArrayLike, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean of ``values`` with its percentile bootstrap interval (Efron & Tibshirani, 1993, chapter 13).

    ``values`` is ``(prompts,)`` or ``(seeds, prompts)``. With seeds, each resample draws seeds and prompts, both with
    replacement and the prompts alike for all drawn seeds: the two are crossed, as every seed answers every prompt.

    Raises ValueError for an empty array, more than two dimensions, or a value that is not finite.
    """
    table = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"expected values of shape (prompts,) or (seeds, prompts), got {np.shape(values)}")
    if not np.isfinite(table).all():
        raise ValueError("a value is not finite; leave the prompt out for both sides of a comparison")
    seeds, prompts = table.shape
    generator = np.random.default_rng(seed)
    # How often each seed and prompt is drawn: a resample's mean is then one product.
    seed_counts = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
    prompt_counts = generator.multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    means = np.einsum("rs,sp,rp->r", seed_counts, table, prompt_counts, optimize=True) / (seeds * prompts)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(table.mean()), float(low), float(high))


def paired_difference(
    after: ArrayLike, before: ArrayLike, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean of ``after - before`` with its interval, paired by prompt and, with two dimensions, by seed.

    Shapes as in ``mean_interval``, the same for both. Raises ValueError where they differ.
    """
    first, second = np.asarray(after, dtype=np.float64), np.asarray(before, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired values need one shape, got {first.shape} and {second.shape}")
    return mean_interval(first - second, confidence, resamples, seed)
