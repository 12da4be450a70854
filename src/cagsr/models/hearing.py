"""What a model's feature extractor makes of a prompt's sound, and what opens a transcript in the decoder (Whisper)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from cagsr.config import ModelConfig
from cagsr.errors import ConfigError, ModelError
from cagsr.flow import EncodedPrompt, ImageInputs
from cagsr.models.files import copy_beside
from cagsr.models.sounds import open_sound
from cagsr.models.vision import PROCESSOR_FILES

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

KNOWN = ("whisper",)
"""Kinds of models that hear: others lay sounds out in time in ways of their own."""
START, BEFORE, PLAIN = "<|startoftranscript|>", "<|startofprev|>", "<|notimestamps|>"
"""What opens a transcript; what opens a text that stands before it; that no times are written into it."""


@dataclass(frozen=True, eq=False)
class Hearing:
    """The feature extractor of a model that hears, beside :class:`~cagsr.models.vision.Vision` for one that sees."""

    token_id: ClassVar[int] = -1
    """No token stands for a sound."""
    extractor: Any
    path: str
    """The model's, for messages."""
    opening: str
    """What the decoder reads before every answer: special tokens that say the language and what is to be done."""
    states: int
    """Encoder states, at which an answer can look; a sound has them in even steps, and silence fills up the rest."""

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        source: str,
        options: Mapping[str, Any],
        model_config: PretrainedConfig,
        generation: GenerationConfig,
        tokenizer: PreTrainedTokenizerBase,
    ) -> Hearing:
        """The feature extractor beside a Whisper model, and the opening that the settings and the model's files ask for.

        ``generation`` then names language and task too, so that a saved model's own ``generate`` opens alike. Raises ModelError
        where the extractor or what opens transcripts doesn't fit the model, ConfigError for a language or task of one that knows
        English alone, and what transformers raises for files that can't be read.
        """
        # Here, where a model is loaded: whoever only reads prompts need not wait for them.
        from transformers import AutoFeatureExtractor
        from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

        extractor = AutoFeatureExtractor.from_pretrained(source, **options)
        states = int(model_config.max_source_positions)
        frames = getattr(extractor, "nb_max_frames", None)
        if frames != 2 * states:
            raise ModelError(
                f"--model.path {config.path}: its feature extractor makes {frames} frames of a sound, and its encoder takes "
                f"{2 * states}; mend preprocessor_config.json."
            )
        known = tokenizer.get_vocab()
        language = str(config.language or getattr(generation, "language", None) or "en").strip("<|>").lower()
        language = TO_LANGUAGE_CODE.get(language, language)
        task = str(config.speech_task or getattr(generation, "task", None) or "transcribe")
        # English-only models may have the tokens, and were taught without them.
        multilingual = "<|transcribe|>" in known and getattr(generation, "is_multilingual", None) is not False
        for name in ("language", "speech_task"):
            if getattr(config, name) is not None and not multilingual:
                raise ConfigError(f"--model.{name} {getattr(config, name)}: {config.path} writes down English alone.")
        pieces = (START, *((f"<|{language}|>", f"<|{task}|>") if multilingual else ()), PLAIN)
        if missing := [mark for mark in pieces if mark not in known]:
            raise ModelError(
                f"--model.path {config.path}: its tokenizer has no {missing[0]}, which should open transcripts (--model.language, "
                "--model.speech_task, or as its generation config says)."
            )
        generation.return_timestamps = False
        if multilingual and getattr(generation, "lang_to_id", None):
            generation.language, generation.task = language, task
        forced = getattr(generation, "forced_decoder_ids", None) or []
        if all(place < len(pieces) for place, _ in forced):
            generation.forced_decoder_ids = None  # the old way to say the opening
        return cls(extractor, config.path, "".join(pieces), states)

    @property
    def rate(self) -> int:
        """Samples a second."""
        return int(self.extractor.sampling_rate)

    @property
    def seconds(self) -> float:
        """The longest sound."""
        return self.states * self.step

    @property
    def step(self) -> float:
        """Seconds from one encoder state to the next: two steps of the extractor's window, by the stride of the convolutions."""
        return float(2 * self.extractor.hop_length / self.rate)

    def note(self) -> str:
        """What was chosen, for the user."""
        return (
            f"Sound: read at {self.rate:,} Hz (files of another rate are resampled), at most {self.seconds:g} seconds; answers are "
            f"written behind {self.opening} (--model.language, --model.speech_task, or the prompt's own text)."
        )

    def inputs(self, encoded: EncodedPrompt, device: torch.device) -> ImageInputs:
        """The features of an encoded prompt's sound, made anew; DataError where it is no longer there."""
        (sound,) = encoded.prompt.sounds
        samples = open_sound(sound, self.rate)
        made = self.extractor(samples, sampling_rate=self.rate, return_tensors="pt")
        return ImageInputs(
            {"input_features": made["input_features"].to(device)},
            True,
            self.token_id,
            torch.tensor(encoded.places, dtype=torch.int64, device=device),
            torch.tensor([region.weight for region in encoded.regions], dtype=torch.float32, device=device),
        )

    def save(self, folder: Path) -> None:
        """Put the extractor's files, as they were found, beside a model that is saved."""
        copy_beside(self.path, PROCESSOR_FILES, folder)
