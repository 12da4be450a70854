"""What a forward is handed of its prompts' images: their tensors side by side, and what goes by token, made of the ids."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from cagsr.errors import ModelError
from cagsr.flow import ImageInputs


@dataclass(frozen=True)
class ImageArguments:
    """The images of the rows of a batch, as arguments of the model's forward."""

    tensors: Mapping[str, Tensor]
    """The images themselves: of a forward that reads prompts."""
    by_token: Mapping[str, Tensor]
    """``(rows, tokens, ...)``: of prompts and what follows them."""
    positions: Tensor | None
    """``(axes, rows, tokens)`` int64, of models whose image tokens have places in the image (M-RoPE)."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        images: Sequence[ImageInputs | None],
        ids: Tensor,
        mask: Tensor,
        answers: Tensor,
        first: Tensor | None = None,
    ) -> ImageArguments:
        """Of rows whose prompts and answers are ``ids`` ``(rows, tokens)`` int64, real where ``mask`` is, of answers where
        ``answers`` is.

        An answer can't hold an image: what looks like one in it is refused where answers are made. ``first``: the rows whose
        images are read, ``(n,)`` int64; None: all. ModelError where a cross-attention model's prompts have different numbers.
        """
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        accepted = inspect.signature(base.forward).parameters
        read = images if first is None else [images[row] for row in first.tolist()]
        tensors = stacked(read, lambda name: name in accepted)
        token_id = next(one.token_id for one in images if one is not None)
        is_image = (ids == token_id) & mask
        # PaliGemma's tell prompts, whose tokens all see each other, from answers.
        types = answers if base.config.model_type == "paligemma" else is_image
        by_token = {
            name: tensor.long()
            for name, tensor in (("token_type_ids", types), ("mm_token_type_ids", is_image))
            if name in accepted
        }
        if "cross_attention_mask" in accepted:
            by_token["cross_attention_mask"] = _cross_attention_mask(images, ids, token_id)
        return cls(tensors, by_token, _positions(base, images, ids, mask, is_image))

    def of_forward(
        self, rows: Tensor | None = None, tokens: slice = slice(None), *, with_images: bool
    ) -> dict[str, Any]:
        """The arguments of a forward over some of the rows (None: all) and some of their tokens."""

        def part(tensor: Tensor) -> Tensor:
            return (tensor if rows is None else tensor[rows])[:, tokens]

        found: dict[str, Any] = {name: part(tensor) for name, tensor in self.by_token.items()}
        if self.positions is not None:
            positions = self.positions if rows is None else self.positions[:, rows]
            found["position_ids"] = positions[..., tokens]
        return {**found, **self.tensors} if with_images else found


def padded_places(images: Sequence[ImageInputs | None], width: int | None) -> tuple[Tensor, int]:
    """The region of each place of rows, ``(rows, places)`` int64, -1 for none, and how many regions a row has at most.

    Places that are tokens end where prompts do, at ``width``; image states (None) begin with the first.
    """
    given = [torch.empty(0, dtype=torch.int64) if one is None else one.places for one in images]
    device = next(one.places.device for one in images if one is not None)
    most = max(len(one) for one in given) if width is None else width
    places = torch.full((len(given), most), -1, dtype=torch.int64, device=device)
    for row, one in enumerate(given):
        places[row, slice(0, len(one)) if width is None else slice(most - len(one), most)] = one
    return places, max((len(one.weights) for one in images if one is not None), default=0)


def region_weights(images: Sequence[ImageInputs | None]) -> Tensor:
    """``(rows, regions)`` float32: what each region weighs, 0 on padding and where a row has no image."""
    there = [one for one in images if one is not None]
    empty = there[0].weights[:0]
    return pad_sequence([empty if one is None else one.weights for one in images], batch_first=True)


def stacked(images: Sequence[ImageInputs | None], wanted: Callable[[str], bool] = bool) -> dict[str, Tensor]:
    """The tensors of several prompts, those of ``wanted`` names, as one batch's, padded with zeros."""
    there = [one for one in images if one is not None]
    by_row = any(one.by_row for one in there)
    found = {}
    for name in filter(wanted, there[0].tensors if there else ()):
        parts = [one.tensors[name] for one in there]
        sizes = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
        padded = iter([_padded(part, sizes) for part in parts])
        empty = parts[0].new_zeros(1, *sizes)
        found[name] = torch.cat(
            [next(padded) if one is not None else empty for one in images if one is not None or by_row]
        )
    return found


def _padded(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    missing = [size - own for size, own in zip(sizes, tensor.shape[1:], strict=True)]
    return functional.pad(tensor, [part for own in reversed(missing) for part in (0, own)]) if any(missing) else tensor


def _cross_attention_mask(images: Sequence[ImageInputs | None], ids: Tensor, token_id: int) -> Tensor:
    """``(rows, tokens, images, tiles)`` int64: which images each token looks at, those that stand right before it."""
    # Here, where it is needed: terms read weights of regions in this file, and a list of terms need not wait for models.
    from transformers.models.mllama import processing_mllama as mllama

    counts = {0 if one is None else one.tensors["pixel_values"].shape[1] for one in images}
    if len(counts) > 1:
        raise ModelError(
            f"Prompts with {' and '.join(map(str, sorted(counts)))} images in one batch: in this model tokens before an image look "
            "at all of the batch's, so that prompts would change each other; give prompts with the same number of images."
        )
    tiles = [one.tensors["aspect_ratio_mask"][0].sum(dim=-1).tolist() for one in images if one is not None]
    most = next(one.tensors["aspect_ratio_mask"].shape[-1] for one in images if one is not None)
    spans = [mllama.get_cross_attention_token_mask(row, token_id) for row in ids.tolist()]
    found = mllama.convert_sparse_cross_attention_mask_to_dense(spans, tiles, most, ids.shape[1])
    return torch.from_numpy(found).to(ids.device)


def _positions(
    base: Any, images: Sequence[ImageInputs | None], ids: Tensor, mask: Tensor, is_image: Tensor
) -> Tensor | None:
    """Positions of models that know more than one axis, as they themselves work them out."""
    inner: Any = getattr(base, "model", None)
    if not hasattr(inner, "get_rope_index"):
        return None
    grids = stacked(images, lambda name: name.endswith("_thw"))
    positions, _ = inner.get_rope_index(ids, mm_token_type_ids=is_image.long(), attention_mask=mask.long(), **grids)
    return torch.as_tensor(positions)
