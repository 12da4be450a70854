"""What the answers to one prompt looked at and what the reward made of it: everything the page shows, as numbers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cagsr.attention import AttentionRegion, Reading
from cagsr.attention.probe import AttentionLayers, find_attention_layers
from cagsr.config import RewardConfig
from cagsr.diagnosis.signals import read_separately
from cagsr.flow import EncodedPrompt, EpisodeBatch, RewardBatch
from cagsr.models.hearing import Hearing
from cagsr.models.load import LoadedModel
from cagsr.models.pictures import as_data_url
from cagsr.models.sounds import open_sound
from cagsr.models.vision import Vision
from cagsr.prompts.salience import explain_salience
from cagsr.reward.answers import AnswerScorer
from cagsr.reward.terms.coverage import coverage_gains
from cagsr.reward.terms.focus import focus
from cagsr.reward.terms.repetition import repeated_ngrams, without_stop_token
from cagsr.reward.weigh import Scales, weigh
from cagsr.scoring.answers import Response
from cagsr.view.sound_strip import playable, waveform

Floats = NDArray[np.float32]

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
LONGEST_CHARACTER = 8
"""Tokens that one character may be split into."""
PIECE = "\N{BLACK SMALL SQUARE}"
"""How a token that is a piece of an image is shown."""
LARGEST = 640
"""Pixels of an image's longer side on a page."""
MOST_ELEMENTS = 4_000_000
"""Numbers, over all answers, that single layers and heads may take beside the attention that the reward reads."""


@dataclass(frozen=True)
class Plane:
    """One layer's attention, or (``head`` None) the mean of its heads; ``layer`` None: what the reward reads."""

    layer: int | None
    head: int | None


REWARD = Plane(None, None)


@dataclass(frozen=True)
class Answer:
    """One answer with what it looked at."""

    number: int
    """Its place among the answers as they were given, from 1."""
    text: str
    tokens: tuple[str, ...]
    ended: bool
    reward: float
    terms: Mapping[str, float]
    """Raw values; NaN where a term does not apply."""
    contributions: Mapping[str, float]
    """Of the terms with a weight; they sum to the reward."""
    gains: Floats
    """``(response,)`` the coverage that each token adds."""
    focus: Floats
    """``(response,)`` the focus of each token; its mean is the term."""
    repeated: tuple[bool, ...]
    """Tokens that are part of an n-gram said before."""
    best: Floats
    """``(words,)`` the best attention that each salient word got."""
    planes: Mapping[Plane, Floats]
    """``(response, prompt)`` attention: what the reward reads, and single layers and heads."""
    regions: Floats | None = None
    """``(response, regions)`` the reward's attention to the regions of the prompt's images or its sound; None: it has none."""


@dataclass(frozen=True)
class Measured:
    """One prompt and its answers, the best first."""

    prompt: EncodedPrompt
    tokens: tuple[str, ...]
    """Of the prompt."""
    words: tuple[str, ...]
    """The salient words."""
    share: Floats
    """``(words,)`` share of each in the prompt's salience."""
    answers: tuple[Answer, ...]
    weights: Mapping[str, float]
    layers: tuple[int, ...]
    """Layers that the reward reads."""
    planes: tuple[Plane, ...]
    """Which attention was read, that of the reward first."""
    reward: RewardConfig
    pooling: str
    scale: str
    """What the contributions are, in a sentence."""
    model: str
    pictures: tuple[str, ...] = ()
    """The prompt's images, or the waveform of its sound, as data URLs."""
    sound: str = ""
    """The sound to listen to, as a data URL; empty: there is none."""
    seconds: float = 0.0
    """How long the sound lasts."""

    @property
    def most(self) -> float:
        """The largest contribution, for the length of the bars; 1 where there is none."""
        return max((abs(value) for one in self.answers for value in one.contributions.values()), default=0.0) or 1.0


def measure(
    loaded: LoadedModel,
    prompt: EncodedPrompt,
    responses: Sequence[Response],
    scorer: AnswerScorer,
    scales: Scales | None = None,
) -> Measured:
    """Score answers to one prompt, each of a token or more, and read what they looked at.

    ``scales`` are those of a run; None: those of these answers (see :func:`cagsr.reward.weigh.weigh`).
    Raises DataError for an answer of zero tokens, AttentionError where the model's attention can't be read, RewardError where
    a term fails, RunError where the run's scales are those of other terms.
    """
    found = find_attention_layers(loaded.model)
    elements = len(prompt.ids) * sum(len(response.ids) for response in responses)
    planes = planes_with_room(found, scorer.scorer.reader.layers, elements)
    batches: list[tuple[RewardBatch, dict[str, Tensor], dict[Plane, Tensor]]] = []
    for batch, values in scorer.score_texts([prompt] * len(responses), responses):
        batches.append((batch, values, read_planes(loaded, batch.episodes, found, planes)))
    raw = {name: torch.cat([values[name] for _, values, _ in batches]) for name in scorer.weights}
    weighed = weigh(raw, scorer.weights, scorer.config, torch.zeros(len(responses), dtype=torch.int64), scales)
    answers: list[Answer] = []
    for batch, _, read in batches:
        for row in range(len(batch.episodes.completions)):
            number = len(answers)
            details = _details(batch, row, scorer)
            length = len(responses[number].ids)
            assert batch.attention is not None
            looked = {REWARD: batch.attention.maps.cpu(), **read}
            answers.append(
                Answer(
                    number=number + 1,
                    text=responses[number].text,
                    tokens=tuple(token_pieces(loaded.tokenizer, responses[number].ids)),
                    ended=responses[number].ended,
                    reward=float(weighed.total[number]),
                    terms={name: float(values[number]) for name, values in raw.items()},
                    contributions={name: float(values[number]) for name, values in weighed.contributions.items()},
                    planes={plane: _array(attention[row, :length]) for plane, attention in looked.items()},
                    regions=_regions(batch, row, length, len(prompt.regions)),
                    **details,
                )
            )
    total = sum(prompt.salience)
    return Measured(
        prompt=prompt,
        tokens=tuple(
            PIECE if loaded.vision is not None and number == loaded.vision.token_id else text
            for number, text in zip(prompt.ids, token_pieces(loaded.tokenizer, prompt.ids), strict=True)
        ),
        words=tuple(word for word, _ in explain_salience(prompt, loaded.tokenizer)),
        share=np.array([weight / total for weight in prompt.salience], dtype=np.float32),
        # sorted is stable: equal answers stay in their order, as in cagsr rank.
        answers=tuple(sorted(answers, key=lambda answer: -answer.reward)),
        weights=scorer.weights,
        layers=tuple(scorer.scorer.reader.layers),
        planes=(REWARD, *planes),
        reward=scorer.config,
        pooling=scorer.salience.pooling,
        scale=weighed.note,
        model=loaded.path,
        **_media(loaded.vision, prompt),
    )


def _media(vision: Vision | Hearing | None, prompt: EncodedPrompt) -> dict[str, Any]:
    """The prompt's images; or its sound as a picture, to listen to, and its length."""
    if not isinstance(vision, Hearing):
        return {"pictures": tuple(as_data_url(picture, LARGEST) for picture in prompt.prompt.images)}
    samples = open_sound(prompt.prompt.sounds[0], vision.rate)
    return {
        "pictures": (waveform(samples),),
        "sound": playable(samples, vision.rate),
        "seconds": len(samples) / vision.rate,
    }


def _regions(batch: RewardBatch, row: int, length: int, count: int) -> Floats | None:
    """What one answer's tokens looked at of the images, if there are any."""
    if batch.attention is None or batch.attention.regions is None:
        return None
    return _array(batch.attention.regions[row, :length, :count])


def _array(values: Tensor) -> Floats:
    return values.detach().float().cpu().numpy()


def _details(batch: RewardBatch, row: int, scorer: AnswerScorer) -> dict[str, Any]:
    """Everything about one answer of a batch that is read token by token or word by word."""
    assert batch.attention is not None
    rollout, attention = batch.episodes, batch.attention.words
    mask = rollout.sampled[row : row + 1]
    length = int(mask.sum())
    looked, salience = attention[row : row + 1, :length], rollout.salience[row : row + 1]
    mask = mask[:, :length]
    config = scorer.config
    counted = without_stop_token(mask, rollout.ended[row : row + 1])
    ends = repeated_ngrams(rollout.ids[row : row + 1, :length], counted, config.repetition.n)[0] > 0
    repeated = [bool(ends[place : place + config.repetition.n].any()) for place in range(length)]
    # Each token as an answer of its own: the term is the mean over tokens, so these are its summands.
    alone = focus(looked[0][:, None], salience.expand(length, -1), mask.new_ones(length, 1), config.focus.entropy_floor)
    return {
        "gains": _array(coverage_gains(looked, salience, mask, config.coverage.threshold)[0]),
        "focus": _array(alone),
        "repeated": tuple(repeated),
        "best": _array(looked[0].amax(dim=0)),
    }


def planes_with_room(found: AttentionLayers, chosen: Sequence[int], elements: int) -> list[Plane]:
    """List the single layers and heads that a page has room for, besides what the reward reads, the ``chosen`` layers.

    All layers with all heads, else with the chosen layers' heads, else all layers, else the chosen ones, else none.
    ``elements`` are tokens of the prompt times tokens of the answers.
    """
    layers = [Plane(layer.number, None) for layer in found.layers]
    heads = [Plane(layer.number, head) for layer in found.layers for head in range(layer.heads)]
    some = [plane for plane in layers if plane.layer in chosen]
    some_heads = [plane for plane in heads if plane.layer in chosen]
    choices = ([*layers, *heads], [*layers, *some_heads], layers, some)
    return next((choice for choice in choices if len(choice) * elements <= MOST_ELEMENTS), [])


def read_planes(
    loaded: LoadedModel, rollout: EpisodeBatch, found: AttentionLayers, planes: Sequence[Plane]
) -> dict[Plane, Tensor]:
    """Read single layers and heads in one forward: plane -> ``(batch, response, prompt)`` float32 on the CPU."""
    layers = {layer.number: layer for layer in found.layers}

    def reader(plane: Plane) -> Callable[[AttentionRegion], Reading]:
        assert plane.layer is not None
        layer, heads = layers[plane.layer], None if plane.head is None else (plane.head,)
        return lambda region: Reading({layer.module: layer}, {layer.number: heads}, region, False, found.model_type)

    readers = {plane: reader(plane) for plane in planes}
    return {plane: one.cpu() for plane, one in read_separately(loaded, rollout, readers).items()} if planes else {}


def token_pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Give each token's text, the space before it included.

    A character that is split over several tokens (an emoji in a byte-level vocabulary) is shown by the first of them;
    the others are empty. Special tokens are texts too.
    """

    def decode(part: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(part), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    pieces: list[str] = []
    start = 0
    while start < len(ids):
        for width in range(1, min(LONGEST_CHARACTER, len(ids) - start) + 1):
            text = decode(ids[start : start + width])
            if UNFINISHED not in text:
                break
        else:
            width, text = 1, decode(ids[start : start + 1])
        if start > 0:
            # Many tokenizers drop the space before a piece that is decoded alone: the piece before it brings it back.
            before = decode(ids[start - 1 : start])
            both = decode(ids[start - 1 : start + width])
            if UNFINISHED not in before and both.startswith(before):
                text = both[len(before) :]
        pieces += [text, *[""] * (width - 1)]
        start += width
    return pieces
