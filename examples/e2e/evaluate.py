"""Judge a model on the test prompts: facts missed, added and wrong, ROUGE-L, repetition, length, entropy.

    python -m examples.e2e.evaluate runs/e2e/sft-seed0 --test runs/e2e/test.jsonl

A gain counts only at matched entropy: ``match_entropy`` finds the temperature at which the start model is as peaked as the
trained one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from scipy.optimize import brentq
from torch import Tensor

from cagsr.evaluation.metrics import length_in_words, mean_interval, repetition, rouge_l
from examples.e2e.prepare import read_jsonl
from examples.e2e.slots import check

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """One answer to each prompt, with what sampling saw."""

    texts: tuple[str, ...]
    tokens: Floats  # (prompts,) sampled tokens, the stop token included
    entropy: Floats  # (prompts,) mean entropy of the sampled distributions, nats per token
    ended: Floats  # (prompts,) 1 where the answer stopped by itself


@dataclass(frozen=True)
class Evaluation:
    """Measures of one model at one temperature, a value for each prompt (averaged over its samples)."""

    temperature: float
    values: dict[str, Floats]
    """missed, wrong, added (shares of the prompt's facts; missed includes wrong), hits, rouge_l, repetition, words,
    tokens, entropy, ended; each ``(prompts,)``."""
    texts: tuple[str, ...]
    """The first answer to each prompt."""

    @property
    def means(self) -> dict[str, float]:
        """Mean over prompts of each measure."""
        return {name: float(values.mean()) for name, values in self.values.items()}


def evaluate(
    model_dir: str | Path,
    test: str | Path,
    temperatures: Sequence[float] = (1.0, 0.0),
    samples: int = 1,
    seed: int = 0,
    limit: int | None = None,
    max_new_tokens: int = 80,
) -> list[Evaluation]:
    """Answer every prompt of ``test`` and judge the answers, once for each temperature (0 is greedy).

    Rows of ``test`` hold ``prompt`` and, for ROUGE-L, ``references`` (without them it is NaN). The same seed gives the
    same answers.
    """
    model, tokenizer = load(model_dir)
    rows = read_jsonl(Path(test))[:limit]
    return [
        judge(
            rows,
            [
                generate(model, tokenizer, [row["prompt"] for row in rows], temperature, seed + number, max_new_tokens)
                for number in range(samples if temperature > 0 else 1)
            ],
            temperature,
        )
        for temperature in temperatures
    ]


def load(model_dir: str | Path) -> tuple[Any, Any]:
    """Model (float32, evaluation mode) and tokenizer of a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(model_dir)


def judge(rows: Sequence[dict[str, Any]], draws: Sequence[Answers], temperature: float) -> Evaluation:
    """Measure the answers of each draw against the rows, and average over draws."""
    collected: dict[str, list[Floats]] = {}
    for answers in draws:
        reports = [check(row["prompt"], text) for row, text in zip(rows, answers.texts, strict=True)]
        measured = {
            "missed": [len(report.missed) / report.facts for report in reports],
            "wrong": [len(report.wrong) / report.facts for report in reports],
            "added": [len(report.added) / report.facts for report in reports],
            "hits": [report.hits for report in reports],
            "rouge_l": [
                rouge_l(text, row["references"]) if row.get("references") else np.nan
                for row, text in zip(rows, answers.texts, strict=True)
            ],
            "repetition": [repetition(text) for text in answers.texts],
            "words": [length_in_words(text) for text in answers.texts],
            "tokens": answers.tokens,
            "entropy": answers.entropy,
            "ended": answers.ended,
        }
        for name, values in measured.items():
            collected.setdefault(name, []).append(np.asarray(values, dtype=np.float64))
    values = {name: np.mean(draws_of, axis=0) for name, draws_of in collected.items()}
    return Evaluation(temperature, values, draws[0].texts)


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    temperature: float = 1.0,
    seed: int = 0,
    max_new_tokens: int = 80,
    batch_size: int = 256,
) -> Answers:
    """Sample one answer a prompt from ``softmax(logits / temperature)``; 0 takes the likeliest token.

    The entropy is that of the sampled distribution; at temperature 0, where that is zero, of ``softmax(logits)``.
    """
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda number: len(encoded[number]))
    texts = [""] * len(prompts)
    tokens, entropy, ended = (np.zeros(len(prompts)) for _ in range(3))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        # Each batch has its own stream, so that a longer answer in one changes nothing in the next.
        generator = torch.Generator().manual_seed(1_000_003 * seed + start)
        ids, entropies, mask = _generate_batch(
            model, tokenizer, [encoded[number] for number in chosen], temperature, generator, max_new_tokens
        )
        for number, text in zip(chosen, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
            texts[number] = text.strip()
        tokens[chosen] = mask.sum(1).numpy()
        entropy[chosen] = ((entropies * mask).sum(1) / mask.sum(1)).numpy()
        ended[chosen] = (ids == tokenizer.eos_token_id).any(1).numpy()
    return Answers(tuple(texts), tokens, entropy, ended)


def _generate_batch(
    model: Any, tokenizer: Any, encoded: list[list[int]], temperature: float, generator: torch.Generator, limit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, entropies and mask of the answers, each ``(batch, response)``; prompts are padded on the left."""
    width = max(map(len, encoded))
    pad, stop = tokenizer.pad_token_id, tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in encoded])
    attended = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded])
    positions = (attended.cumsum(1) - 1).clamp(min=0)
    running = torch.ones(len(encoded), dtype=torch.bool)
    out_ids, out_entropy, out_mask = [], [], []
    cache = None
    for _ in range(limit):
        output = model(
            input_ids=ids,
            attention_mask=attended,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        logp = (output.logits[:, -1] / (temperature or 1.0)).log_softmax(-1)  # (batch, vocabulary)
        if temperature > 0:
            # Gumbel-max with one stream of noise: two temperatures see the same luck, which makes bisection smooth.
            noise = torch.rand(logp.shape, generator=generator).clamp(min=1e-20)
            drawn = (logp - (-noise.log()).log()).argmax(-1)
        else:
            drawn = logp.argmax(-1)
        drawn = torch.where(running, drawn, pad)
        out_ids.append(drawn)
        out_entropy.append(-(logp.exp() * logp).sum(-1))
        out_mask.append(running)
        running = running & (drawn != stop)
        if not running.any():
            break
        ids = drawn[:, None]
        attended = torch.cat([attended, torch.ones_like(ids)], 1)
        positions = positions[:, -1:] + 1
    return torch.stack(out_ids, 1), torch.stack(out_entropy, 1), torch.stack(out_mask, 1)


def match_entropy(
    model_dir: str | Path,
    prompts: Sequence[str],
    target: float,
    seed: int = 0,
    low: float = 0.1,
    high: float = 1.5,
    tolerance: float = 0.005,
    max_new_tokens: int = 80,
) -> float:
    """Temperature, within ``tolerance``, at which a model's own samples have the entropy ``target`` (nats; Brent's method).

    Entropy is the mean over prompts of each answer's mean token entropy, as ``Evaluation.means["entropy"]`` of samples at
    temperature 1 gives it: hand in the same prompts.

    Raises ValueError where the target lies outside what temperatures between ``low`` and ``high`` give.
    """
    model, tokenizer = load(model_dir)

    def entropy(temperature: float) -> float:
        return float(generate(model, tokenizer, prompts, temperature, seed, max_new_tokens).entropy.mean())

    found: dict[float, float] = {}

    def error(temperature: float) -> float:
        found.setdefault(temperature, entropy(temperature) - target)
        return found[temperature]

    if error(low) > 0 or error(high) < 0:
        raise ValueError(f"entropy {target:.3f} is not reached between temperatures {low} and {high}")
    return float(brentq(error, low, high, xtol=tolerance))


@dataclass(frozen=True)
class Options:
    """Judge a model on the test prompts."""

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of the model."""
    test: Path = Path("runs/e2e/test.jsonl")
    """JSONL with prompt and references."""
    temperatures: tuple[float, ...] = (1.0, 0.0)
    """Temperatures; 0 is greedy."""
    samples: int = 1
    """Answers to each prompt."""
    seed: int = 0
    """Seeds the sampling."""
    limit: int | None = None
    """Use only the first prompts."""


def main(options: Options) -> None:
    """Print a line for each temperature."""
    for result in evaluate(
        options.model, options.test, options.temperatures, options.samples, options.seed, options.limit
    ):
        print(f"temperature {result.temperature:g}")
        for name, values in result.values.items():
            if np.isfinite(values).all():  # ROUGE-L needs references
                print(f"  {name:<12}{mean_interval(values)}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
