"""Learn the grounding probe from the starting model's own answers and counterfactual prompts, or read that of an earlier run."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from cagsr.config import ANSWERS_AT_ONCE, ProbeConfig, RewardConfig, SamplingConfig
from cagsr.errors import ConfigError, DataError
from cagsr.flow import EncodedPrompt, Prompt
from cagsr.models.inputs import PassInputs
from cagsr.models.layer_probe import LayerProbe, at_tokens, hidden_states_of, layers_of
from cagsr.models.load import LoadedModel
from cagsr.prompts.counterfactual import Counterfactuals, Swapped, held_words
from cagsr.prompts.encode import TextEncoder
from cagsr.prompts.salience import DocumentFrequency
from cagsr.prompts.stating_words import StatingWords
from cagsr.rollout.sample_prompts import sample_in_batches
from cagsr.scoring.answers import Response, answered
from cagsr.scoring.scorer import FrozenModel, evaluating
from cagsr.scoring.stating_tokens import StatingTokensOf
from cagsr.support.processes import broadcast
from cagsr.support.progress import each, working

ANSWERS_TO_A_PROMPT = 4
MOST_LAYERS = 8
"""Layers that are compared, evenly spread."""
FEWEST_LABELS = 30
"""Words of either kind that the probe is fitted on, at least."""
AT_ONCE = 16
"""Answers in a pass."""
RIDGE = 30.0
"""Of the standardised weights; chosen on Gemma 3 270M among 3, 30 and 300, which differ by 0.02 in correlation."""
SEED = 15_485_863
"""Added to the run's seed, so that these answers are not the first step's."""
FORMAT = "linear probe of hidden states at words that state something"


@dataclass(frozen=True)
class Probe:
    """A probe and how well it tells words that a prompt holds from words swapped out of it."""

    layer: LayerProbe
    auc: float
    """Area under the ROC curve on prompts that it was not fitted on."""
    by_layer: dict[int, float]
    """The same of all layers that were compared."""
    supported: int
    """Words of the one kind, and of the other."""
    swapped: int

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form, which :meth:`from_json` reads; it names what it is."""
        return {
            "format": FORMAT,
            "layer": self.layer.layer,
            "weight": self.layer.weight.tolist(),
            "bias": self.layer.bias,
            "auc": self.auc,
            "by_layer": {str(number): value for number, value in self.by_layer.items()},
            "supported": self.supported,
            "swapped": self.swapped,
        }

    @classmethod
    def from_json(cls, value: Any) -> Probe:
        """Read what :meth:`to_json` wrote; DataError for something else."""
        try:
            if value["format"] != FORMAT:
                raise ValueError(value["format"])
            weight = torch.tensor([float(one) for one in value["weight"]], dtype=torch.float32)
            return cls(
                LayerProbe(int(value["layer"]), weight, float(value["bias"])),
                float(value["auc"]),
                {int(number): float(one) for number, one in value["by_layer"].items()},
                int(value["supported"]),
                int(value["swapped"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError('A probe\'s file holds "layer", "weight" and "bias", as cagsr writes it.') from error


@dataclass(frozen=True)
class Pair:
    """An answer and a prompt, the true one or another; ``words`` are looked at, case-folded, None: all that state something."""

    prompt: EncodedPrompt
    answer: Response
    words: frozenset[str] | None = None


@dataclass(frozen=True)
class WordStates:
    """Hidden states of words, and where each stands."""

    hidden: dict[int, Tensor]
    """Layer -> ``(words, width)`` float32."""
    pair: NDArray[np.int64]
    """``(words,)``: which pair it belongs to."""
    number: NDArray[np.int64]
    """``(words,)``: the how-manieth stating word of that pair's answer."""
    word: tuple[str, ...]
    """Its key."""


class Swaps(Protocol):
    """Makes counterfactual prompts."""

    def of(self, prompt: Prompt, answer: str, count: int, draw: random.Random) -> Sequence[Swapped]:
        """At most ``count`` of them, each with the words that the true prompt says and it does not."""


@dataclass(frozen=True)
class Examples:
    """Hidden states of answers' words under prompts that hold them, and under prompts from which they were swapped."""

    hidden: dict[int, Tensor]
    """Layer -> ``(words, width)`` float32, the mean over a word's tokens."""
    supported: NDArray[np.bool_]
    """``(words,)``."""
    prompt: NDArray[np.int64]
    """``(words,)``: the number of the true prompt."""


@working("learning the grounding probe")
def probe_of(
    loaded: LoadedModel,
    prompts: Sequence[EncodedPrompt],
    frequency: DocumentFrequency,
    sampling: SamplingConfig,
    config: ProbeConfig,
    *,
    seed: int,
    batch_size: int = ANSWERS_AT_ONCE,
    accelerator: Accelerator | None = None,
) -> Probe:
    """Read the probe that ``config.path`` names, or fit one on the model's own answers to these prompts.

    The main process does it, all get the same; the global random generators are left as they were. ConfigError: prompts
    too few, or too like each other, for enough swaps; DataError: the file can't be read or is something else.
    """
    if config.path is not None:
        path = Path(config.path)
        return broadcast(lambda: read_probe(path), accelerator)
    return broadcast(
        lambda: fit_probe(examples_of(loaded, prompts, frequency, sampling, config, seed, batch_size), config.layer),
        accelerator,
    )


def named_probe(reward: RewardConfig) -> Probe | None:
    """Read the file that ``reward.probe.path`` names; None: none is named."""
    return None if reward.probe.path is None else read_probe(Path(reward.probe.path))


def read_probe(path: Path) -> Probe:
    """Read a ``grounding_probe.json``; DataError, which names it, for no such file or one that holds something else."""
    try:
        return Probe.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: no readable JSON file; name the grounding_probe.json of a cagsr train run."
        ) from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def examples_of(
    loaded: LoadedModel,
    prompts: Sequence[EncodedPrompt],
    frequency: DocumentFrequency,
    sampling: SamplingConfig,
    config: ProbeConfig,
    seed: int,
    batch_size: int,
    swaps: Swaps | None = None,
    frozen: FrozenModel | None = None,
) -> Examples:
    """Sample answers, swap phrases of their prompts, and read both; of ``config.layer`` alone, or of several layers.

    ``swaps`` makes the counterfactual prompts; None: :class:`~cagsr.prompts.counterfactual.Counterfactuals`. ``frozen`` reads the
    answers, as it reads those that are judged; None: the model itself.
    """
    everything = range(len(layers_of(loaded.model)))
    if config.layer is not None and config.layer not in everything:
        raise ConfigError(f"--reward.probe.layer {config.layer}: the model has the layers 0 to {len(everything) - 1}.")
    draw = random.Random(seed + SEED)
    chosen = draw.sample(list(prompts), min(len(prompts), max(1, config.answers // ANSWERS_TO_A_PROMPT)))
    generations = math.ceil(config.answers / len(chosen))
    each_prompt = replace(sampling, num_generations=generations, temperature=sampling.temperature or 1.0)
    stating = StatingWords(frequency)
    swaps = swaps or Counterfactuals((one.prompt for one in prompts), stating)
    encoder, context = TextEncoder(loaded.tokenizer), loaded.pair_context()
    pairs: list[Pair] = []
    number_of: list[int] = []
    supports: list[bool] = []
    for number, asked, said in _answers(loaded, chosen, each_prompt, seed, max(1, batch_size // generations)):
        prompt = asked.prompt
        pairs.append(Pair(asked, said, held_words(prompt)))
        for swapped in swaps.of(prompt, said.text, config.counterfactuals, draw):
            tokens = encoder.encode(swapped.text, add_special_tokens=prompt.messages is None)
            if context is not None and len(tokens.ids) + len(said.ids) > context:
                continue  # a longer phrase took the place of a shorter one
            other = EncodedPrompt(prompt, tokens.ids, (-1,) * len(tokens.ids), ())
            pairs.append(Pair(other, said, swapped.lost))
        supports += [True, *[False] * (len(pairs) - len(supports) - 1)]
        number_of += [number] * (len(pairs) - len(number_of))
    layers = spread(everything) if config.layer is None else (everything[config.layer],)
    found = hidden_of_words(loaded, pairs, stating, layers, frozen)
    return Examples(found.hidden, np.array(supports)[found.pair], np.array(number_of, dtype=np.int64)[found.pair])


def _answers(
    loaded: LoadedModel, prompts: Sequence[EncodedPrompt], sampling: SamplingConfig, seed: int, per_batch: int
) -> Iterator[tuple[int, EncodedPrompt, Response]]:
    """The number of each prompt, the prompt, and an answer to it."""
    generations, number = sampling.num_generations, 0
    for some, rollout in sample_in_batches(loaded, prompts, sampling, seed + SEED, per_batch):
        for row, text in enumerate(rollout.completions):
            ids = rollout.ids[row][rollout.real[row]].tolist()
            asked = row // generations
            yield number + asked, some[asked], Response(text, tuple(ids), bool(rollout.ended[row]))
        number += len(some)


def hidden_of_words(
    loaded: LoadedModel,
    pairs: Sequence[Pair],
    stating: StatingWords,
    layers: Sequence[int],
    frozen: FrozenModel | None = None,
) -> WordStates:
    """Hidden states of stating words in answers, the mean over a word's tokens, pair by pair and word by word."""
    tokens_of = StatingTokensOf(loaded, stating)
    found: list[tuple[int, int, str, dict[int, Tensor]]] = []
    order = sorted(range(len(pairs)), key=lambda place: len(pairs[place].prompt.ids) + len(pairs[place].answer.ids))
    reader = nullcontext(loaded.model) if frozen is None else frozen.model()
    with torch.no_grad(), reader as model, evaluating(model), loaded.autocast():
        for start in each("reading hidden states", range(0, len(order), AT_ONCE), "batches"):
            places = order[start : start + AT_ONCE]
            episodes = answered(
                loaded, [pairs[place].prompt for place in places], [pairs[place].answer for place in places]
            )
            inputs = PassInputs.of(episodes)
            with hidden_states_of(model, dict.fromkeys(layers, lambda states: states.float())) as seen:
                loaded.hidden_states(inputs, model)
            states = {layer: at_tokens(loaded.architecture, model, inputs, seen[layer]) for layer in layers}
            words = tokens_of(episodes)
            last = episodes.sampled & (episodes.sampled.cumsum(dim=1) == episodes.lengths[:, None])
            words = words.masked_fill(last, -1)  # as the term does
            for row, place in enumerate(places):
                text, _ = loaded.spans(list(pairs[place].answer.ids))
                keys, wanted = [word.key for word in stating.of(text)], pairs[place].words
                for number in words[row][words[row] >= 0].unique().tolist():
                    if wanted is None or keys[number] in wanted:
                        own = {layer: states[layer][row, words[row] == number].mean(dim=0).cpu() for layer in layers}
                        found.append((place, number, keys[number], own))
    found.sort(key=lambda one: one[:2])
    hidden = {layer: torch.stack([one[3][layer] for one in found]) if found else torch.zeros(0, 1) for layer in layers}
    pair, number = (np.array([one[place] for one in found], dtype=np.int64) for place in (0, 1))
    return WordStates(hidden, pair, number, tuple(one[2] for one in found))


def spread(layers: Sequence[int]) -> tuple[int, ...]:
    """At most ``MOST_LAYERS`` of a model's layers, evenly spread."""
    if len(layers) <= MOST_LAYERS:
        return tuple(layers)
    return tuple(layers[round(place * (len(layers) - 1) / (MOST_LAYERS - 1))] for place in range(MOST_LAYERS))


def fit_probe(examples: Examples, layer: int | None = None) -> Probe:
    """Fit a probe of each layer on three quarters of the prompts, take the best on the fourth, and fit that one on all.

    ConfigError: too few words of either kind.
    """
    kinds = int(examples.supported.sum()), int((~examples.supported).sum())
    fourth = examples.prompt % 4 == 0
    parts = [examples.supported[fourth], examples.supported[~fourth]]
    if min(kinds) < FEWEST_LABELS or any(part.all() or not part.any() for part in parts):
        raise ConfigError(
            f"The grounding probe needs {FEWEST_LABELS} words that prompts hold and as many that were swapped out of them, and "
            f"{kinds[0]} and {kinds[1]} were found: give more prompts or --reward.probe.answers, name a file with "
            "--reward.probe.path, or set the weight of grounding_probe to 0."
        )
    by_layer: dict[int, float] = {}
    for number, hidden in examples.hidden.items():
        tried = fit(hidden[~fourth], examples.supported[~fourth])
        by_layer[number] = auc(logits(tried, hidden[fourth]).numpy(), examples.supported[fourth])
    # Of equally good ones the earliest: what it says is there before anything else is mixed in.
    best = (
        max(by_layer, key=lambda number: (round(by_layer[number], 3), -number))
        if layer is None
        else next(iter(by_layer))
    )
    weight, bias = fit(examples.hidden[best], examples.supported)
    return Probe(LayerProbe(best, weight, bias), by_layer[best], by_layer, *kinds)


@working("checking the grounding probe")
def probe_check(
    loaded: LoadedModel,
    probe: Probe,
    prompts: Sequence[EncodedPrompt],
    frequency: DocumentFrequency,
    sampling: SamplingConfig,
    config: ProbeConfig,
    frozen: FrozenModel,
    *,
    seed: int,
    batch_size: int,
) -> tuple[float, float]:
    """How well a probe tells words in the answers of the policy as it is now, and how well one does that is fitted on them.

    Both are the AUC on prompts that neither was fitted on. Where the second is much better, the policy has moved to where the
    first no longer sees. ConfigError as :func:`fit_probe`.
    """
    same_layer = replace(config, path=None, layer=probe.layer.layer)
    examples = examples_of(loaded, prompts, frequency, sampling, same_layer, seed + 1, batch_size, frozen=frozen)
    again = fit_probe(examples, probe.layer.layer)
    fourth = examples.prompt % 4 == 0
    hidden = examples.hidden[probe.layer.layer][fourth]
    kept = logits((probe.layer.weight.cpu(), probe.layer.bias), hidden)
    return auc(kept.double().numpy(), examples.supported[fourth]), again.auc


def fit(hidden: Tensor, supported: NDArray[np.bool_]) -> tuple[Tensor, float]:
    """Ridge logistic regression of standardised hidden states ``(words, width)``, both kinds weighing alike: weight and bias."""
    x, y = hidden.double(), torch.from_numpy(supported).double()
    mean, deviation = x.mean(dim=0), x.std(dim=0, correction=0) + 1e-6
    z = (x - mean) / deviation
    share = y.mean()
    weights = torch.where(y > 0, 0.5 / share, 0.5 / (1 - share))
    w = torch.zeros(z.shape[1], dtype=torch.float64, requires_grad=True)
    b = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([w, b], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        with torch.enable_grad():
            found = binary_cross_entropy_with_logits(z @ w + b, y, weight=weights) + RIDGE * w.square().sum() / len(y)
            found.backward()
        return found

    optimiser.step(loss)
    scaled = w.detach() / deviation
    return scaled.float(), float(b.detach() - scaled @ mean)


def logits(probe: tuple[Tensor, float], hidden: Tensor) -> Tensor:
    """The probe's numbers, ``(words,)``."""
    return hidden @ probe[0] + probe[1]


def auc(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve: how often a positive one has the higher score, ties half (Mann-Whitney)."""
    ranks = rankdata(scores)
    many = int(positive.sum())
    return float((ranks[positive].sum() - many * (many + 1) / 2) / (many * (len(scores) - many)))
