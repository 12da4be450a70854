"""What is done with every field of a model's generation config: one table (``generation.yaml``), and what follows from it.

Answers are sampled at the ``sampling`` settings. What a model's ``generation_config.json`` asks for besides is honoured (in
sampling, in scoring and in the trained model's own ``generation_config.json`` alike), replaced by a setting, switched off in
both, or refused: the trained model, served with its own file, samples as it did while it was trained. A test compares the
table with the fields of the transformers that is installed; a field it doesn't know is switched off by name, never silently.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from torch import nn
from transformers import GenerationConfig

from cagsr.config import SamplingConfig
from cagsr.errors import ModelError

if TYPE_CHECKING:
    from cagsr.models.load import LoadedModel

_FIELDS = yaml.safe_load(Path(__file__).with_name("generation.yaml").read_text(encoding="utf-8"))
HONOURED: Mapping[str, str] = _FIELDS["honoured"]
SETTINGS: Mapping[str, str] = _FIELDS["settings"]
OFF: Mapping[str, Sequence[Any]] = _FIELDS["switched_off"]
INERT = frozenset[str](_FIELDS["inert"])
SPEECH = frozenset[str](_FIELDS["speech"])
REFUSED: Mapping[str, str] = _FIELDS["refused"]


@dataclass(frozen=True)
class GenerationRules:
    """What a model's generation config means for sampling and scoring."""

    forced: tuple[int, ...] = ()
    """Tokens that follow the start token in the decoder's input, before the answer (encoder-decoder models)."""
    never: tuple[int, ...] = ()
    """Tokens that are never sampled."""
    never_first: tuple[int, ...] = ()
    """Tokens that are not sampled as an answer's first."""
    off: Mapping[str, Any] = field(default_factory=dict)
    """What is switched off: field and value."""
    replaced: Mapping[str, Any] = field(default_factory=dict)
    """What the sampling settings replace: field and value."""
    foreign: tuple[str, ...] = ()
    """Entries that are no field of transformers' generation config: nothing reads them, they are left as they are."""


def read_generation_rules(
    settings: GenerationConfig | None, *, encoder_decoder: bool, stop_ids: Sequence[int], path: str
) -> GenerationRules:
    """Sort the fields that a model's generation config sets; ModelError for one that can't be trained or sampled with.

    ``stop_ids`` end an answer; ``path`` is the model's, for messages. A forced first token means something only to a
    decoder.
    """
    if settings is None:
        return GenerationRules()
    given = {name: value for name, value in vars(settings).items() if not name.startswith("_") and value is not None}
    for name, why in REFUSED.items():
        if given.get(name):
            raise ModelError(f"--model.path {path}: its generation config sets {name}, and {why}; take it out.")
    start, forced = given.get("decoder_start_token_id"), given.get("forced_bos_token_id")
    if encoder_decoder and start is not None and not isinstance(start, int):
        raise ModelError(
            f"--model.path {path}: its generation config has several decoder_start_token_id, one for each row of a batch; "
            "name one."
        )
    if encoder_decoder and forced in stop_ids:
        raise ModelError(
            f"--model.path {path}: its generation config forces token {forced} at the start of every answer "
            "(forced_bos_token_id), and that token ends answers; mend one of the two."
        )
    known = vars(GenerationConfig())
    off = {name: given[name] for name, neutral in OFF.items() if name in given and given[name] not in neutral}
    treated = HONOURED.keys() | SETTINGS.keys() | OFF.keys() | INERT | SPEECH
    off |= {name: value for name, value in given.items() if name in known and name not in treated}
    bad_words = [list(words) for words in given.get("bad_words_ids", ())]
    if longer := [words for words in bad_words if len(words) > 1]:
        off["bad_words_ids"] = longer
    single = [words[0] for words in bad_words if len(words) == 1 and words[0] not in stop_ids]
    return GenerationRules(
        forced=(int(forced),) if encoder_decoder and forced is not None else (),
        never=tuple(sorted({*given.get("suppress_tokens", ()), *single})),
        never_first=tuple(given.get("begin_suppress_tokens", ())),
        off=off,
        replaced={name: given[name] for name in SETTINGS if name in given},
        foreign=tuple(sorted(given.keys() - known.keys() - treated)),
    )


def decoder_prefix(model: nn.Module) -> tuple[int, ...]:
    """The tokens that an encoder-decoder model's decoder reads before the answer: the start token and a forced one."""
    settings = getattr(model, "generation_config", None)
    # In the order in which transformers' generate looks for it.
    name = "decoder_start_token_id"
    places = [(settings, name), (model.config, name), (settings, "bos_token_id")]
    start = next(value for place, name in places if (value := getattr(place, name, None)) is not None)
    forced = getattr(settings, "forced_bos_token_id", None)
    return (int(start),) if forced is None else (int(start), int(forced))


def sampled_with(loaded: LoadedModel, sampling: SamplingConfig) -> GenerationConfig:
    """The generation config that answers are sampled with: the sampling settings, and what is honoured of the model's.

    Stop strings are left out: transformers' own criterion fails on some tokenizers (``rollout/sample.py`` has another).
    """
    rules, before = loaded.generation, len(loaded.generation.forced)  # generate counts a forced token as a new one
    settings: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens + before,
        "min_new_tokens": sampling.min_new_tokens + before if sampling.min_new_tokens else None,
        "eos_token_id": list(loaded.stops(sampling)[0]),
        "pad_token_id": loaded.pad_token_id,
        "bos_token_id": loaded.tokenizer.bos_token_id,
        "do_sample": sampling.temperature > 0,
        "suppress_tokens": list(rules.never) or None,
        "begin_suppress_tokens": list(rules.never_first) or None,
    }
    if not loaded.architecture.one_sequence:
        settings["decoder_start_token_id"] = decoder_prefix(loaded.model)[0]
        settings["forced_bos_token_id"] = rules.forced[0] if rules.forced else None
    if sampling.temperature > 0:
        settings |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return GenerationConfig(**settings)


def served_with(loaded: LoadedModel, sampling: SamplingConfig) -> GenerationConfig:
    """The trained model's own generation config: with it ``model.generate()`` samples as training did."""
    served = copy.deepcopy(loaded.model.generation_config or GenerationConfig())
    for name in [*SETTINGS, *OFF, *loaded.generation.off, "bad_words_ids", "forced_bos_token_id"]:
        setattr(served, name, None)
    for name, value in vars(sampled_with(loaded, sampling)).items():
        if name in HONOURED.keys() | SETTINGS.keys() and value is not None:
            setattr(served, name, value)
    served._from_model_config = False  # it is a decision now, which no older default may replace
    served.stop_strings = list(loaded.stops(sampling)[1]) or None
    return served


def ending_as(loaded: LoadedModel) -> GenerationConfig:
    """The starting model's generation config as it is, but for the tokens that end answers and fill up batches.

    For trainings that sample nothing: the answers they train on end with the tokenizer's EOS.
    """
    kept = copy.deepcopy(loaded.model.generation_config or GenerationConfig())
    kept.eos_token_id = list(loaded.stop_ids) if len(loaded.stop_ids) > 1 else loaded.stop_ids[0]
    kept.pad_token_id = loaded.pad_token_id
    return kept


def generation_notes(loaded: LoadedModel, sampling: SamplingConfig) -> list[str]:
    """What the user should know of the model's generation config, one sentence each; none where it asks for nothing."""
    rules, notes = loaded.generation, []
    if rules.forced:
        pieces = loaded.tokenizer.convert_ids_to_tokens(list(rules.forced))
        notes.append(
            f"Generation config: every answer begins with {' '.join(map(repr, pieces))} (forced_bos_token_id), which is "
            "read, not sampled: no reward and no loss are on it."
        )
    if banned := len({*rules.never, *rules.never_first}):
        notes.append(f"Generation config: {banned} token(s) that it forbids are not sampled.")
    ours = vars(sampled_with(loaded, sampling))
    other = {name: value for name, value in rules.replaced.items() if ours.get(name) != value and name != "do_sample"}
    dropped = {**other, **rules.off}
    if dropped:
        texts = {name: str(value) for name, value in dropped.items()}
        told = ", ".join(f"{name} {text if len(text) <= 40 else f'{text[:37]}...'}" for name, text in texts.items())
        notes.append(f"Generation config, switched off: {told}; answers are sampled at the --sampling settings alone.")
    if rules.foreign:
        notes.append(f"Generation config: {', '.join(rules.foreign)} means nothing to transformers; left as it is.")
    return notes
