r"""Does a probe of hidden states find the numbers and names that a summary makes up? AUROC word by word, for docs/signals.md.

    python -m examples.scitldr.grounding --model runs/scitldr/start-seed0 --prompts runs/scitldr/prompts.jsonl \
        --test runs/scitldr/test.jsonl --output grounding.json --markdown grounding.md

The probe is learned as the term ``grounding_probe`` learns it, from answers to ``--prompts`` and without a label, and judges
answers to other abstracts. What is true of a word, a regular expression says (``examples.scitldr.measures.stated``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray
from torch import Tensor

from cagsr.config import AttentionConfig, SamplingConfig
from cagsr.errors import DataError
from cagsr.evaluation.intervals import Floats, Interval
from cagsr.flow import EncodedPrompt
from cagsr.models.load import LoadedModel
from cagsr.prompts.find_words import Word
from cagsr.prompts.stating_words import StatingWords
from cagsr.reward.learn_probe import Pair, Swaps, auc, fit, fit_probe, hidden_of_words, logits
from cagsr.reward.terms.context_gain import prompt_tokens
from cagsr.scoring.answers import Response, answered
from cagsr.scoring.hidden_words import HiddenWords
from cagsr.scoring.scorer import Scorer
from cagsr.scoring.stating_tokens import StatingTokensOf
from cagsr.support.atomic import write_text_atomically
from cagsr.support.progress import each, say, shown
from examples.e2e import probe_variants
from examples.e2e.probe_variants import OtherPrompt, Removed
from examples.scitldr.measures import stated

RESAMPLES = 1000
AT_ONCE = 32
"""Answers in a pass of the two signals without a probe."""


@dataclass(frozen=True)
class Options(probe_variants.Options):
    """Find what summaries make up."""

    model: Path
    """The starting model."""
    prompts: Path
    """Abstracts that the probe is learned from."""
    test: Path
    """Abstracts whose summaries it judges."""
    output: Path | None = None
    """JSON file of all numbers, and of every word that was judged."""
    markdown: Path | None = None
    """The table."""
    candidates: int = 4
    """Summaries of each abstract."""
    max_new_tokens: int = 60
    """Tokens of a summary at most."""


class NumbersAndNames(StatingWords):
    """Of a summary its numbers and names, in place of the words that some prompts of a set say."""

    def of(self, text: str) -> list[Word]:
        """They, in order."""
        return [Word(one.start, one.end, text[one.start : one.end]) for one in stated("", text)]


@dataclass(frozen=True)
class Judged:
    """Numbers and names of summaries, all ``(words,)``."""

    absent: NDArray[np.bool_]
    """Not in the abstract."""
    number: NDArray[np.bool_]
    """Else a name."""
    abstract: NDArray[np.int64]
    """Which one the word's summary is of."""
    signals: dict[str, Floats]
    """More of it: more likely made up."""
    texts: tuple[tuple[str, str], ...]
    """The word, and the summary it stands in."""


def main(options: Options) -> None:
    """Learn, judge, and write what was found."""
    with shown("grounding of summaries"):
        judged, by_layer = judge(options)
    rows = {name: auroc_interval(values, judged.absent, judged.abstract) for name, values in judged.signals.items()}
    kinds = {
        kind: {
            name: auc(values[own], judged.absent[own]) if 0 < judged.absent[own].sum() < own.sum() else float("nan")
            for name, values in judged.signals.items()
        }
        for kind, own in (("numbers", judged.number), ("names", ~judged.number))
    }
    lines = [
        f"{len(judged.absent)} numbers and names ({int(judged.number.sum())} and {int((~judged.number).sum())}) in summaries "
        f"of {len(np.unique(judged.abstract))} abstracts; {int(judged.absent.sum())} are not in the abstract "
        f"({int(judged.absent[judged.number].sum())} and {int(judged.absent[~judged.number].sum())}).",
        "",
        "| signal | AUROC | numbers | names |",
        "| --- | --- | --- | --- |",
    ]
    for name, interval in rows.items():
        lines.append(f"| {name} | {interval:.2f} | {kinds['numbers'][name]:.2f} | {kinds['names'][name]:.2f} |")
    table = "\n".join(lines)
    print(table)
    if options.markdown is not None:
        write_text_atomically(options.markdown, table + "\n")
    if options.output is not None:
        words = [
            {"word": word, "summary": text, "absent": bool(absent), "abstract": int(abstract)}
            for (word, text), absent, abstract in zip(judged.texts, judged.absent, judged.abstract, strict=True)
        ]
        found = {"auroc": {name: vars(one) for name, one in rows.items()}, "by_layer": by_layer, "words": words}
        write_text_atomically(options.output, json.dumps(found, indent=1))
    say("AUC on swapped words of other prompts by layer: " + ", ".join(f"{k}: {v:.3f}" for k, v in by_layer.items()))


def judge(options: Options) -> tuple[Judged, dict[int, float]]:
    """The words with every signal, and how well each layer's probe tells swapped words on prompts it was not fitted on."""
    drawn = probe_variants.draw(options)
    loaded, asked, said = drawn.loaded, drawn.asked, drawn.said
    facts = [list(stated(one.prompt.text, answer.text)) for one, answer in zip(asked, said, strict=True)]
    held = [one.held for own in facts for one in own]
    if all(held) or not any(held):
        raise DataError(
            f"{options.test}: of {len(held)} numbers and names {held.count(False)} are made up: nothing to tell apart; give more "
            "--test_prompts."
        )
    stating, named = StatingWords(drawn.frequency), NumbersAndNames(drawn.frequency)

    examples = drawn.learned()
    probe = fit_probe(examples)
    layers, best = tuple(examples.hidden), probe.layer.layer
    states = hidden_of_words(loaded, [Pair(*one) for one in zip(asked, said, strict=True)], named, layers)

    def doubt(weight_and_bias: tuple[Tensor, float], layer: int = best) -> Floats:
        return -logits(weight_and_bias, states.hidden[layer]).double().numpy()

    signals = {f"**the term's probe, layer {best}**": doubt((probe.layer.weight, probe.layer.bias))}
    for layer in layers:
        if layer != best:
            own = doubt(fit(examples.hidden[layer], examples.supported), layer)
            signals[f"- layer {layer} (AUC {probe.by_layer[layer]:.3f})"] = own
    half = examples.prompt < np.median(examples.prompt)
    signals["- half of the answers"] = doubt(fit(examples.hidden[best][half], examples.supported[half]))
    others: dict[str, Swaps] = {
        "a phrase removed, not swapped": Removed((one.prompt for one in drawn.prompts), stating),
        "another abstract, no swap": OtherPrompt([one.prompt for one in drawn.prompts]),
    }
    for name, swaps in others.items():
        other = drawn.learned(swaps)
        signals[f"- {name}"] = doubt(fit(other.hidden[best], other.supported))
    places = list(zip(states.pair.tolist(), states.number.tolist(), strict=True))
    logprob, gain = of_words(loaded, asked, said, named, places)
    signals["surprise (- log-probability of the word)"] = -logprob
    signals["- the prompt's gain at the word"] = -gain

    kept = [facts[pair][number] for pair, number in places]
    texts = tuple(
        (said[pair].text[one.start : one.end], said[pair].text) for (pair, _), one in zip(places, kept, strict=True)
    )
    judged = Judged(
        np.array([not one.held for one in kept]),
        np.array([one.number for one in kept]),
        states.pair // options.candidates,
        signals,
        texts,
    )
    return judged, probe.by_layer


def of_words(
    loaded: LoadedModel,
    asked: Sequence[EncodedPrompt],
    said: Sequence[Response],
    named: StatingWords,
    wanted: Sequence[tuple[int, int]],
) -> tuple[Floats, Floats]:
    """Log-probability of each ``wanted`` word (answer, which word of it), its tokens' sum, and what it gains from the prompt."""
    scorer = Scorer(loaded, AttentionConfig(), SamplingConfig(), AT_ONCE)
    hidden, tokens_of = HiddenWords(loaded), StatingTokensOf(loaded, named)
    found: dict[tuple[int, int], tuple[float, float]] = {}
    for start in each("summaries with and without abstracts", range(0, len(said), AT_ONCE), "batches"):
        episodes = answered(loaded, asked[start : start + AT_ONCE], said[start : start + AT_ONCE])
        given = scorer.policy(episodes).logprobs
        gain = given - hidden(episodes, prompt_tokens(episodes.prompts.real, episodes.words))
        words = tokens_of(episodes)
        for row, own in enumerate(words):
            for number in own[own >= 0].unique().tolist():
                found[start + row, number] = tuple(float(one[row, own == number].sum()) for one in (given, gain))  # type: ignore[assignment]
    both = np.array([found[one] for one in wanted])
    return both[:, 0], both[:, 1]


def auroc_interval(values: Floats, absent: NDArray[np.bool_], abstract: NDArray[np.int64], seed: int = 0) -> Interval:
    """AUROC of ``values`` for ``absent`` words with its 95 % interval, abstracts resampled.

    Draws in which all words are of one kind are left out.
    """
    generator = np.random.default_rng(seed)
    numbers = np.unique(abstract)
    places = [np.flatnonzero(abstract == number) for number in numbers]
    drawn = []
    for _ in range(RESAMPLES):
        rows = np.concatenate([places[one] for one in generator.integers(len(numbers), size=len(numbers))])
        if 0 < absent[rows].sum() < len(rows):
            drawn.append(auc(values[rows], absent[rows]))
    return Interval.of(auc(values, absent), np.array(drawn))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
