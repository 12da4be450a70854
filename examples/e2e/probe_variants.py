r"""What a probe of hidden states sees of invented facts, and what each of its parts is worth: a table for docs/signals.md.

    python -m examples.e2e.probe_variants --model runs/pretrained/start-seed0 --prompts runs/pretrained/prompts.jsonl \
        --test runs/pretrained/test.jsonl --output probe.json --markdown probe.md

The probe is learned from answers to ``--prompts``, without any label, and judges answers to other prompts; the published slot
patterns say what is added and what is wrong in them. Correlations within the answers to a prompt.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from torch import Tensor

from cagsr.config import DataConfig, ModelConfig, ProbeConfig, SalienceConfig, SamplingConfig
from cagsr.diagnosis.cross_fit import held_fixed
from cagsr.evaluation.intervals import Floats, Interval
from cagsr.flow import EncodedPrompt, EpisodeBatch, Prompt
from cagsr.models.load import LoadedModel, load_model
from cagsr.prompts.counterfactual import Counterfactuals, Swapped, held_words
from cagsr.prompts.prepare import prepare_prompts
from cagsr.prompts.salience import DocumentFrequency
from cagsr.prompts.stating_words import StatingWords
from cagsr.reward.learn_probe import (
    Examples,
    Pair,
    Probe,
    Swaps,
    WordStates,
    examples_of,
    fit,
    fit_probe,
    hidden_of_words,
    logits,
)
from cagsr.reward.terms.context_gain import prompt_tokens
from cagsr.rollout.sample_prompts import sample_in_batches
from cagsr.scoring.answers import Response, answered
from cagsr.scoring.hidden_words import HiddenWords
from cagsr.scoring.scorer import Scorer
from cagsr.scoring.stating_tokens import StatingTokensOf
from cagsr.support.atomic import write_text_atomically
from cagsr.support.progress import say, shown, working
from examples.e2e.slots import check

COLUMNS = ("invented", "the same, length held fixed", "added", "wrong", "facts said", "length")
MIXED = "probe + lexical support (z-scores)"


@dataclass(frozen=True)
class Options:
    """Compare variants of the probe."""

    model: Path
    """The starting model."""
    prompts: Path
    """Prompts that it is learned from."""
    test: Path
    """Prompts whose answers it judges."""
    output: Path | None = None
    """JSON file of all numbers."""
    markdown: Path | None = None
    """The table."""
    test_prompts: int = 80
    """Prompts judged."""
    candidates: int = 8
    """Answers to each of them."""
    answers: int = 256
    """Answers that the probe is learned from."""
    max_new_tokens: int = 64
    """Tokens of an answer at most."""
    batch_size: int = 16
    """Prompts answered at once."""
    seed: int = 0
    """For the draw of prompts and answers."""


@dataclass(frozen=True)
class Judged:
    """Answers with the truth about them, all ``(answers,)``."""

    group: np.ndarray
    length: Floats
    added: Floats
    wrong: Floats
    said: Floats


class OtherPrompt:
    """Counterfactuals without a swap: another prompt of the set."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts

    def of(self, prompt: Prompt, answer: str, count: int, draw: random.Random) -> list[Swapped]:
        """Whole prompts, drawn."""
        others = [one for one in draw.sample(list(self.prompts), count + 1) if one.text != prompt.text][:count]
        return [Swapped(one.text, held_words(prompt) - held_words(one)) for one in others]


class Removed(Counterfactuals):
    """Counterfactuals without another value: the phrase is taken out."""

    def of(self, prompt: Prompt, answer: str, count: int, draw: random.Random) -> list[Swapped]:
        """As the swaps, but nothing stands in the phrase's place."""
        made = []
        for swap in super().of(prompt, answer, count, draw):
            assert swap.phrase is not None
            text = prompt.text[: swap.phrase.start] + prompt.text[swap.phrase.end :]
            lost = held_words(prompt) - held_words(dataclasses.replace(prompt, text=text))
            made.append(Swapped(text, lost, swap.phrase))
        return made


def judge(asked: Sequence[EncodedPrompt], said: Sequence[Response], candidates: int) -> Judged:
    """Added, wrong and said facts of each answer as shares of its prompt's facts."""
    reports = [check(prompt.prompt.text, answer.text) for prompt, answer in zip(asked, said, strict=True)]
    facts = np.array([float(one.facts) for one in reports])
    return Judged(
        np.repeat(np.arange(len(asked) // candidates), candidates),
        np.array([float(len(answer.ids)) for answer in said]),
        np.array([len(one.added) for one in reports]) / facts,
        np.array([len(one.wrong) for one in reports]) / facts,
        np.array([one.hits for one in reports]),
    )


def within(x: Floats, y: Floats, group: np.ndarray) -> float:
    """Correlation after centring both within each prompt."""
    count = np.bincount(group)

    def centred(values: Floats) -> Floats:
        return values - (np.bincount(group, values) / count)[group]

    a, b = centred(x), centred(y)
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else 0.0


def row_of(values: Floats, truth: Judged) -> dict[str, float]:
    """The columns of the table."""
    invented, prompts = truth.added + truth.wrong, int(truth.group.max()) + 1
    by_prompt = (one.reshape(prompts, -1) for one in (values, invented, truth.length))
    return {
        "invented": within(values, invented, truth.group),
        "the same, length held fixed": held_fixed(*by_prompt),
        "added": within(values, truth.added, truth.group),
        "wrong": within(values, truth.wrong, truth.group),
        "facts said": within(values, truth.said, truth.group),
        "length": within(values, truth.length, truth.group),
    }


def interval_of(values: Floats, truth: Judged, seed: int = 0) -> Interval:
    """Of the correlation with what is invented: prompts resampled."""
    draw = np.random.default_rng(seed)
    invented, prompts = truth.added + truth.wrong, int(truth.group.max()) + 1
    by_prompt = [np.flatnonzero(truth.group == number) for number in range(prompts)]
    drawn = []
    for _ in range(1000):
        chosen = draw.integers(prompts, size=prompts)
        rows = np.concatenate([by_prompt[number] for number in chosen])
        group = np.repeat(np.arange(prompts), [len(by_prompt[number]) for number in chosen])
        drawn.append(within(values[rows], invented[rows], group))
    return Interval.of(within(values, invented, truth.group), np.array(drawn))


def by_answer(states: WordStates, words: Floats, answers: int, make: Callable[[Floats], float]) -> Floats:
    """What is made of the words of each answer; 0 of an answer that states nothing."""
    found = np.zeros(answers)
    for number in np.unique(states.pair):
        found[number] = make(words[states.pair == number])
    return found


def denied(words: Floats) -> float:
    """As the term takes it, before the division by the answer's length."""
    return float(np.minimum(words, 0.0).sum())


def said_by(words: Floats) -> Floats:
    """One where the probe denies a word."""
    return (words < 0).astype(float)


@dataclass(frozen=True)
class Drawn:
    """Answers to judge, and what a probe is learned from."""

    options: Options
    loaded: LoadedModel
    prompts: list[EncodedPrompt]
    """That the probe is learned from."""
    frequency: DocumentFrequency
    """Of their words."""
    sampling: SamplingConfig
    asked: list[EncodedPrompt]
    """The prompt of each answer that is judged."""
    said: list[Response]

    def learned(self, swaps: Swaps | None = None) -> Examples:
        """Words of new answers under true and counterfactual prompts."""
        one = self.options
        config, at_once = ProbeConfig(answers=one.answers), one.batch_size * 4
        return examples_of(self.loaded, self.prompts, self.frequency, self.sampling, config, one.seed, at_once, swaps)


def draw(options: Options) -> Drawn:
    """Read model and prompts, and sample the answers that are judged."""
    loaded = load_model(ModelConfig(str(options.model)), for_training=False)
    salience, sampling = SalienceConfig(), SamplingConfig(max_new_tokens=options.max_new_tokens)
    room = loaded.room_for_prompts(options.max_new_tokens)
    pool = prepare_prompts(DataConfig(str(options.prompts)), salience, loaded.tokenizer, max_length=room)
    test = prepare_prompts(
        DataConfig(str(options.test)), salience, loaded.tokenizer, max_length=room, frequency=pool.frequency
    )
    prompts = list({one.prompt.text: one for one in pool.prompts}.values())
    unique = list({one.prompt.text: one for one in test.prompts}.values())
    chosen = random.Random(options.seed).sample(unique, min(options.test_prompts, len(unique)))
    asked, said = answers_to(loaded, chosen, sampling, options.candidates, options.seed, options.batch_size)
    return Drawn(options, loaded, prompts, pool.frequency, sampling, asked, said)


def main(options: Options) -> None:
    """Learn, judge, and write what was found."""
    with shown("probe variants"):
        rows, intervals, probe = compare(options)
    lines = [f"| signal | {' | '.join(COLUMNS)} |", "| --- |" + " --- |" * len(COLUMNS)]
    for name, row in rows.items():
        cells = [f"{row[column]:+.2f}" for column in COLUMNS]
        one = intervals[name]
        cells[0] += f" [{one.low:+.2f}, {one.high:+.2f}]"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    print(table)
    if options.markdown is not None:
        write_text_atomically(options.markdown, table + "\n")
    if options.output is not None:
        found = {"rows": rows, "probe": {**probe.to_json(), "weight": None}}
        write_text_atomically(options.output, json.dumps(found, indent=1))
    by_layer = ", ".join(f"{layer}: {value:.3f}" for layer, value in probe.by_layer.items())
    say(
        f"Layer {probe.layer.layer}; {probe.supported:,} words that prompts hold, {probe.swapped:,} swapped out; AUC on other "
        f"prompts by layer: {by_layer}."
    )


def compare(options: Options) -> tuple[dict[str, dict[str, float]], dict[str, Interval], Probe]:
    """The rows of the table, the interval of each row's first column, and the probe."""
    drawn = draw(options)
    loaded, asked, said = drawn.loaded, drawn.asked, drawn.said
    stating = StatingWords(drawn.frequency)
    truth = judge(asked, said, options.candidates)
    examples = drawn.learned()
    probe = fit_probe(examples)
    layers = tuple(examples.hidden)
    states = hidden_of_words(loaded, [Pair(*one) for one in zip(asked, said, strict=True)], stating, layers)
    count, length = len(said), truth.length
    best = probe.layer.layer

    def words(weight_and_bias: tuple[Tensor, float], layer: int = best) -> Floats:
        return logits(weight_and_bias, states.hidden[layer]).double().numpy()

    def term(found: Floats) -> Floats:
        return by_answer(states, found, count, denied) / length

    own = words((probe.layer.weight, probe.layer.bias))
    support = np.array(
        [
            stating.support(one.prompt.text, answer.text, one.prompt.template)[0]
            for one, answer in zip(asked, said, strict=True)
        ]
    )
    held = [held_words(one.prompt) for one in asked]
    absent = np.array([float(word not in held[pair]) for pair, word in zip(states.pair, states.word, strict=True)])
    found = {
        "lexical support (share)": support,
        "lexical: absent words a token": -by_answer(states, absent, count, np.sum) / length,
        f"**the term: layer {best}, denied a token**": term(own),
        "- mean over the words": by_answer(states, own, count, np.mean),
        "- the worst word": by_answer(states, own, count, np.min),
        "- denied, not divided by length": by_answer(states, own, count, denied),
        "- words denied a token": -by_answer(states, said_by(own), count, np.sum) / length,
    }
    for layer in layers:
        if layer != best:
            fitted = fit(examples.hidden[layer], examples.supported)
            found[f"- layer {layer} (AUC {probe.by_layer[layer]:.3f})"] = term(words(fitted, layer))
    order = np.unique(examples.prompt)
    for share in (4, 2):
        some = np.isin(examples.prompt, order[: len(order) // share])
        fitted = fit(examples.hidden[best][some], examples.supported[some])
        found[f"- 1/{share} of the answers"] = term(words(fitted))
    others: dict[str, Swaps] = {
        "a phrase removed, not swapped": Removed((one.prompt for one in drawn.prompts), stating),
        "another prompt, no swap": OtherPrompt([one.prompt for one in drawn.prompts]),
    }
    for name, swaps in others.items():
        other = drawn.learned(swaps)
        found[f"- {name}"] = term(words(fit(other.hidden[best], other.supported)))
    mixed = [(one - one.mean()) / one.std() for one in (term(own), support)]
    found[MIXED] = mixed[0] + mixed[1]
    found["context gain of stating words, a token"] = contrast(loaded, asked, said, stating, drawn.sampling) / length
    rows = {name: row_of(values, truth) for name, values in found.items()}
    return rows, {name: interval_of(values, truth) for name, values in found.items()}, probe


def answers_to(
    loaded: LoadedModel,
    prompts: Sequence[EncodedPrompt],
    sampling: SamplingConfig,
    candidates: int,
    seed: int,
    batch_size: int,
) -> tuple[list[EncodedPrompt], list[Response]]:
    """Sample the answers that are judged; the prompt of each, and the answer."""
    each = dataclasses.replace(sampling, num_generations=candidates)
    asked: list[EncodedPrompt] = []
    said: list[Response] = []
    for some, rollout in sample_in_batches(loaded, prompts, each, seed, batch_size):
        for row, text in enumerate(rollout.completions):
            ids = rollout.ids[row][rollout.real[row]].tolist()
            asked.append(some[row // candidates])
            said.append(Response(text, tuple(ids), bool(rollout.ended[row])))
    return asked, said


@working("reading answers with and without their prompts")
def contrast(
    loaded: LoadedModel,
    asked: Sequence[EncodedPrompt],
    said: Sequence[Response],
    stating: StatingWords,
    sampling: SamplingConfig,
) -> Floats:
    """Two passes instead of a probe: the gain of the prompt where it is negative, summed over the stating words' tokens."""
    from cagsr.config import AttentionConfig

    scorer, hidden, tokens = (
        Scorer(loaded, AttentionConfig(), sampling, 16),
        HiddenWords(loaded),
        StatingTokensOf(loaded, stating),
    )
    values: list[float] = []
    for start in range(0, len(said), 64):
        episodes: EpisodeBatch = answered(loaded, asked[start : start + 64], said[start : start + 64])
        given = scorer.policy(episodes).logprobs
        without = hidden(episodes, prompt_tokens(episodes.prompts.real, episodes.words))
        gain = (given - without).clamp(max=0.0)
        values += (gain * (tokens(episodes) >= 0)).sum(dim=1).tolist()
    return np.array(values)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
