"""What a model's processor makes of a prompt with images: token ids, tensors, and where in the image each place of them lies.

The ids that the processor makes are the prompt's for good: a placeholder is expanded once, here, and nothing is tokenised again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers.utils import cached_file

from cagsr.errors import DataError
from cagsr.flow import EncodedPrompt, ImageInputs, Picture
from cagsr.models.files import copy_beside
from cagsr.models.pictures import open_picture

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PretrainedConfig

Points = NDArray[np.float64]
_OF_TOKENS = frozenset((
    "input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "cross_attention_mask", "text_replacement_offsets",
    "labels",
))  # fmt: skip
"""What processors give for tokens; all else they give is the images'."""
PROCESSOR_FILES = (
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
"""What a processor is stored in, besides the tokenizer's own files; one of the first two is always there."""
KNOWN = ("llava", "qwen2_vl", "qwen2_5_vl", "idefics3", "smolvlm", "gemma3", "paligemma", "mllama")
"""Kinds of models whose arguments and layouts are known: others may mean other things by the same names (PaliGemma's token types
are not Gemma 3's)."""
NEEDS_IMAGE = ("paligemma",)
"""Kinds whose processor takes no prompt without an image."""
_SIZES_KEPT = 1_000
"""Sizes of images whose points are remembered."""


@dataclass(frozen=True)
class Placeholder:
    """Where one image stands in a prompt's text: one placeholder as it was written, and what the processor made of it."""

    start: int
    end: int
    expanded_start: int
    expanded_end: int


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt with images as its processor reads it."""

    text: str
    """Each image is one placeholder."""
    expanded: str
    """What was tokenised."""
    placeholders: tuple[Placeholder, ...]
    ids: tuple[int, ...]
    counts: tuple[int, ...]
    """Of each image: at how many places an answer can look at it, tokens of the prompt or image states."""
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Vision:
    """The processor of a model that reads images."""

    processor: Any
    path: str
    """The model's, for messages."""
    token_id: int
    """The token at whose places images stand in the sequence; where the model looks at them by cross-attention, the token that
    stands for an image."""
    model_type: str
    states: int | None
    """Image states of an image that are looked at by cross-attention; None: images stand in the sequence."""
    _points: dict[tuple[int, int], Points] = field(default_factory=dict)

    @classmethod
    def of(cls, path: str, config: PretrainedConfig, options: Mapping[str, Any]) -> Vision | None:
        """The processor beside a model, None where there is none (a text-only copy), or the kind of model isn't known.

        Nothing of it is used that reads videos, so that ``torchvision`` isn't needed. Raises OSError, ValueError and what else
        transformers raises for files that can't be read.
        """
        if config.model_type not in KNOWN or not _has_processor(path):
            return None
        # brings all that models are made of, which takes seconds that whoever only reads prompts need not wait
        from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

        kind = PROCESSOR_MAPPING.get(type(config), None)
        if kind is None:  # a class of its own by a known name
            return None
        processor = image_only(kind).from_pretrained(path, **options)
        cross = getattr(config.get_text_config(), "cross_attention_layers", None) is not None
        token_id = config.image_token_index if cross else config.image_token_id
        seen = config.vision_config
        states = seen.max_num_tiles * ((seen.image_size // seen.patch_size) ** 2 + 1) if cross else None
        return cls(processor, path, int(token_id), str(config.model_type), states)

    @property
    def placeholder(self) -> str:
        """The text that stands for an image in a prompt."""
        return str(self.processor.image_token)

    @cached_property
    def by_row(self) -> bool:
        """Whether the processor's tensors count prompts, in their first dimension, and not images: asked of it once."""
        made = self._pixels([[_plain((32, 32), 0), _plain((32, 32), 255)]])
        return int(made["pixel_values"].shape[0]) == 1

    def read(self, text: str, pictures: Sequence[Picture], *, special: bool, where: str) -> ReadPrompt:
        """Turn a prompt into token ids and tensors.

        ``special``: with the special tokens that the tokenizer adds by itself. DataError, which ``where`` (file and row) opens,
        where the images can't be read, or are not as many as the placeholders in ``text``.
        """
        count, token = text.count(self.placeholder), self.placeholder
        if count != len(pictures):
            raise DataError(
                f"{where}: the prompt has {_many(count, 'placeholder')} {token} and {_many(len(pictures), 'image')}; "
                "give one image for each."
            )
        images = [[open_picture(picture) for picture in pictures]]
        try:
            _, (text,), *_ = self.processor.prepare_inputs_layout(images=images, text=[text])
            bos = self.processor.tokenizer.bos_token
            made = self.processor(
                text=[text],
                images=images,
                return_tensors="pt",
                # mllama's processor has put a BOS into the text; a second one is none of the prompt's.
                add_special_tokens=special and (self.states is None or bos is None or bos not in text),
                return_text_replacement_offsets=True,
            )
        except (ValueError, TypeError, IndexError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"{where}: the processor of {self.path} can't read the prompt's images ({reason})."
            ) from error
        changes = made.get("text_replacement_offsets") or [[]]
        found, cursor, expanded = [], 0, ""
        for change in changes[0]:
            start, end = change["span"]
            expanded += text[cursor:start] + change["replacement"]
            found.append(Placeholder(start, end, len(expanded) - len(change["replacement"]), len(expanded)))
            cursor = end
        expanded += text[cursor:]
        if not found:  # cross-attention: a placeholder stays what it is
            starts = [place for place in range(len(text)) if text.startswith(token, place)]
            found = [Placeholder(start, start + len(token), start, start + len(token)) for start in starts]
        if "image_grid_thw" in made and any(one.end == other.start for one, other in pairwise(found)):
            raise DataError(
                f"{where}: two placeholders {token} stand side by side, which {self.model_type} models take for one image; write "
                "the marks around each that their chat template writes."
            )
        tensors = {name: value for name, value in made.items() if name not in _OF_TOKENS and isinstance(value, Tensor)}
        piece, ids = self.processor.tokenizer.convert_ids_to_tokens(self.token_id), tuple(made["input_ids"][0].tolist())
        counts = tuple(
            expanded[one.expanded_start : one.expanded_end].count(piece) if self.states is None else self.states
            for one in found
        )
        if self.states is None and sum(counts) != ids.count(self.token_id):
            raise DataError(f"{where}: the prompt holds {piece} beside its images; take it out of the text.")
        return ReadPrompt(text, expanded, tuple(found), ids, counts, tensors)

    def inputs(self, encoded: EncodedPrompt, device: torch.device) -> ImageInputs | None:
        """The tensors of an encoded prompt's images, read anew; None: it has none. DataError where an image is no longer there."""
        prompt = encoded.prompt
        if not prompt.images:
            return None
        where = f"Row {prompt.row}"
        read = self.read(prompt.text, prompt.images, special=prompt.messages is None, where=where)
        if self.states is None and read.ids.count(self.token_id) != encoded.ids.count(self.token_id):
            raise DataError(f"{where}: its images have changed since the prompt was read; start again.")
        return ImageInputs(
            {name: value.to(device) for name, value in read.tensors.items()},
            self.by_row,
            self.token_id,
            torch.tensor(encoded.places, dtype=torch.int64, device=device),
            torch.tensor([region.weight for region in encoded.regions], dtype=torch.float32, device=device),
        )

    def points(
        self, pictures: Sequence[Picture], images: Sequence[Image], counts: Sequence[int], where: str
    ) -> list[Points]:
        """Where in its image each place of each image lies: ``(places, 2)`` shares of width and height; NaN outside of it.

        Asked of the processor, by images of the same size whose colours are coordinates: so whatever it does (resizing,
        cropping, tiles beside a small copy of the whole, padding) is followed. ``counts`` are the places of each image, in
        their order. DataError, which ``where`` opens, where the model lays its places out in a way that isn't known.
        """
        points: list[Points] = []
        for picture, image, count in zip(pictures, images, counts, strict=True):
            if image.size not in self._points:
                made = [found for probe in _probes(image.size) if (found := self._colours(probe, count)) is not None]
                if len(made) < 3:
                    raise DataError(
                        f"{where}: {picture.name} stands at {count} places of the prompt, and how {self.model_type} models lay "
                        "them out over an image isn't known here; use a model whose images are grids of patches."
                    )
                black, white, ramps = made
                with np.errstate(divide="ignore", invalid="ignore"):
                    shares = ((ramps - black) / (white - black))[:, :2]
                shares[~np.isfinite(shares).all(axis=1)] = np.nan
                if len(self._points) == _SIZES_KEPT:
                    self._points.clear()
                self._points[image.size] = shares
            points.append(self._points[image.size])
        return points

    def _colours(self, image: Image, count: int) -> Points | None:
        """The mean colour ``(places, 3)`` at each of the ``count`` places of an image; None where their layout isn't known."""
        pixels = self._pixels([[image]])["pixel_values"].float()
        if pixels.dim() == 2:  # flattened patches, those of a place behind each other
            if count == 0 or pixels.shape[0] % count:
                return None
            patches = pixels.view(count, pixels.shape[0] // count, 3, -1)
            return np.asarray(patches.mean(dim=(1, 3)), dtype=np.float64)
        tiles = pixels.reshape(-1, *pixels.shape[-3:])
        if count == 0 or count % len(tiles):
            return None
        each = count // len(tiles)
        grid = _grid(each, *tiles.shape[-2:])
        lead = 0
        if grid is None:
            grid, lead = _grid(each - 1, *tiles.shape[-2:]), 1  # a class token before the patches
        if grid is None:
            return None
        pooled = functional.adaptive_avg_pool2d(tiles, grid).flatten(2).transpose(1, 2)
        return np.asarray(functional.pad(pooled, (0, 0, lead, 0), value=torch.nan).flatten(0, 1), dtype=np.float64)

    def save(self, folder: Path) -> None:
        """Put the processor's files, as they were found, beside a model that is saved; those that are there stay."""
        copy_beside(self.path, PROCESSOR_FILES, folder)

    def _pixels(self, images: list[list[Any]]) -> Mapping[str, Tensor]:
        made: Mapping[str, Tensor] = self.processor.image_processor(images, return_tensors="pt")
        return made


def load_tokenizer_of(vision: Vision) -> Any:
    """The tokenizer that the processor uses, with the processor's chat template where it has none of its own."""
    tokenizer = vision.processor.tokenizer
    if tokenizer.chat_template is None:
        tokenizer.chat_template = vision.processor.chat_template
    return tokenizer


def image_only(kind: Any) -> Any:
    """A class of processors without the part that reads videos, which needs ``torchvision``; one that puts something into a text
    (PaliGemma's) does so once.
    """
    names = kind.get_attributes()

    def arguments(cls: Any, *given: Any, **options: Any) -> list[Any]:
        found = iter(kind._get_arguments_from_pretrained.__func__(cls, *given, **options))
        return [None if "video" in name else next(found) for name in names]

    def laid_out(self: Any, images: Any = None, text: Any = None, **options: Any) -> Any:
        # A BOS behind the last image and a new line at the end: not again whenever the text is read.
        done = isinstance(text, list) and all(f"{self.image_token}{self.tokenizer.bos_token}" in one for one in text)
        layout = super(kind, self).prepare_inputs_layout if done else partial(kind.prepare_inputs_layout, self)
        return layout(images=images, text=text, **options)

    members: dict[str, Any] = {
        "get_attributes": classmethod(lambda _: [name for name in names if "video" not in name]),
        "_get_arguments_from_pretrained": classmethod(arguments),
    }
    if kind.__name__ == "PaliGemmaProcessor":
        members["prepare_inputs_layout"] = laid_out
    return type(kind.__name__, (kind,), members)


def _has_processor(path: str) -> bool:
    return any(
        cached_file(path, name, _raise_exceptions_for_missing_entries=False) is not None for name in PROCESSOR_FILES[:2]
    )


def _grid(places: int, height: int, width: int) -> tuple[int, int] | None:
    """Rows and columns of so many places in the shape of an image, None where that gives none."""
    rows = round((places * height / width) ** 0.5) if places > 0 else 0
    return (
        (rows, places // rows) if rows > 0 and places % rows == 0 and rows * width == places // rows * height else None
    )


def _plain(size: tuple[int, int], value: int) -> Image:
    from PIL import Image

    return Image.new("RGB", size, (value, value, value))


def _probes(size: tuple[int, int]) -> tuple[Image, Image, Image]:
    """Black, white, and one whose red and green are the shares of its width and height."""
    from PIL import Image

    width, height = size
    ramp = np.zeros((height, width, 3), dtype=np.uint8)
    ramp[..., 0] = np.rint((np.arange(width) + 0.5) / width * 255)
    ramp[..., 1] = np.rint((np.arange(height) + 0.5) / height * 255)[:, None]
    return _plain(size, 0), _plain(size, 255), Image.fromarray(ramp)


def _many(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"
