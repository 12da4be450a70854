"""The reader: prompt attention out of a forward the caller makes anyway."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from cagsr.attention.intercept import Intercepted, listening
from cagsr.attention.plan import Piece, plan_region
from cagsr.attention.probabilities import Softmax
from cagsr.attention.probe import AttentionLayer, find_attention_layers, looks_across
from cagsr.attention.region import AttentionRegion
from cagsr.attention.rows import add_prompt_attention, prompt_attention
from cagsr.attention.select import HeadChoice, parse_heads, parse_layers
from cagsr.errors import AttentionError, ConfigError

_PLANS_KEPT = 4  # masks in use at a time: full and sliding, rarely more


class PromptAttentionReader:
    """Reads the attention of chosen layers and heads of one model; makes one ``Reading`` for each forward.

    ::

        reader = PromptAttentionReader(model, layers="last-4")
        with reader.read(AttentionRegion.left_padded(prompt_mask, response_mask)) as reading:
            output = model(input_ids, attention_mask=attention_mask, position_ids=position_ids)
        reading.attention  # (batch, response, prompt) float32

    Its ``layers`` are the numbers of the layers read; ``cross`` is True where they are the decoder's cross-attention.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | Sequence[int] = "last-4",
        heads: HeadChoice = "all",
        *,
        images: bool = False,
    ) -> None:
        """Find the model's attention by one tiny forward and check the choice (AttentionError, ConfigError).

        ``model`` may be wrapped by peft, DDP, ``torch.compile`` or a module of your own. ``layers`` as for
        ``parse_layers``, ``heads`` as for ``parse_heads``. A model that looks at images by cross-attention has layers of two
        kinds: the reader is of those that look at the text, with ``images`` of the others, each of the layers of its kind that
        ``layers`` names. One that hears looks at both in every layer.
        """
        found = find_attention_layers(model, images=images)
        self.model_type, self.cross = found.model_type, found.cross
        available = sorted({layer.number for layer in found.layers})
        if looks_across(model):
            elsewhere = find_attention_layers(model, images=not images).layers
            other = {layer.number for layer in elsewhere} - set(available)
            layers = _without(layers, other, available, images)
        unreadable = set(range(found.total)) - set(available)
        if not isinstance(layers, str) or not layers.strip().startswith(("last-", "all")):
            _refuse_unreadable(layers, unreadable, found.model_type)
        self.layers = parse_layers(layers, available)
        chosen = [layer for layer in found.layers if layer.number in self.layers]
        self._heads = parse_heads(heads, {layer.number: layer.heads for layer in chosen})
        self._layers: dict[nn.Module, AttentionLayer] = {layer.module: layer for layer in chosen}

    def read(self, region: AttentionRegion, with_gradients: bool = False) -> Reading:
        """Make a context for one forward of the model, whose tensors ``region`` was made for; ``attention`` is there after
        it.

        ``with_gradients`` lets gradients flow from ``attention`` into the model, under non-re-entrant gradient
        checkpointing too; the backward pass may come inside or after the context.
        """
        return Reading(self._layers, self._heads, region, with_gradients, self.model_type)

    @contextmanager
    def read_in_turn(self, regions: Sequence[AttentionRegion]) -> Iterator[list[Reading]]:
        """Read consecutive forwards, each with its own region, inside the block: the prompts, say, and then their answers."""
        readings = [self.read(region) for region in regions]
        turn = 0

        def hear(module: nn.Module, call: Intercepted) -> None:
            nonlocal turn
            # The last forward keeps the turn: one more of it is an error, and its layers may run again in a backward pass.
            if readings[turn].complete and turn + 1 < len(readings):
                turn += 1
            readings[turn].hear(module, call)

        with listening(self._layers, hear, logsumexp=True):
            yield readings


class Reading:
    """What is read from one forward. Serves one forward inside its ``with`` block."""

    def __init__(
        self,
        layers: dict[nn.Module, AttentionLayer],
        heads: dict[int, tuple[int, ...] | None],
        region: AttentionRegion,
        with_gradients: bool,
        model_type: str,
    ) -> None:
        self.region = region
        self.with_gradients = with_gradients
        self._layers, self._heads, self._model_type = layers, heads, model_type
        self._seen: set[nn.Module] = set()
        self._sum: Tensor | None = None
        self._heads_summed = 0
        self._attention: Tensor | None = None
        self._plans: dict[tuple[object, ...], tuple[list[Piece], tuple[object, ...]]] = {}
        self._stack: ExitStack | None = None

    def __enter__(self) -> Reading:
        if self._stack is not None:
            raise AttentionError("A reading serves one with block: call reader.read again for the next forward.")
        self._stack = ExitStack()
        self._stack.enter_context(listening(self._layers, self.hear, logsumexp=not self.with_gradients))
        self._stack.callback(self._plans.clear)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._stack is not None
        self._stack.close()

    @property
    def attention(self) -> Tensor:
        """``(n, response, prompt)`` float32: mean probability over the chosen layers and heads, zero on padding.

        Of a pooled region ``(n, response, words)``, the sum over each word's tokens. The softmax is over all keys that
        a row sees, so a row sums to at most 1. AttentionError before a forward, or where a chosen layer took no part in it.
        """
        if self._attention is None:
            if not self._seen:
                raise AttentionError(
                    "The attention was asked for before a forward of the model inside the with block of the reading."
                )
            missing = sorted(layer.number for module, layer in self._layers.items() if module not in self._seen)
            raise AttentionError(
                f"The attention of the {self._model_type} model's layers {', '.join(map(str, missing))} never "
                f"reported: the forward ended early, or runs in a form (compiled, traced) that can't be listened to."
            )
        return self._attention

    @property
    def complete(self) -> bool:
        """Whether every chosen layer has reported."""
        return self._attention is not None

    def hear(self, module: nn.Module, call: Intercepted) -> None:
        """Take in what one layer's attention call says; the context's listener, or who stands in for it.

        AttentionError where a layer that has reported reports again, or gradients are asked for where there are none.
        """
        # Gradient checkpointing runs a layer again during the backward pass: that is the same forward.
        if torch._C._current_graph_task_id() != -1:
            return
        layer = self._layers[module]
        if module in self._seen:
            raise AttentionError(
                f"A second forward of the {self._model_type} model ran inside one reading (layer {layer.number} "
                f"reported twice): open one reading for each forward."
            )
        if self.with_gradients and not torch.is_grad_enabled():
            raise AttentionError(
                "Attention was asked for with gradients, but the forward runs without them: leave torch.no_grad, or "
                "with gradient checkpointing use gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        self._seen.add(module)
        # Autocast would turn the float32 products into bfloat16 ones.
        device = call.query.device.type
        full_precision = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        with full_precision:
            self._add(module, layer, call)
        if len(self._seen) == len(self._layers):
            self._finish()

    def _add(self, module: nn.Module, layer: AttentionLayer, call: Intercepted) -> None:
        heads = self._heads[layer.number]
        self._heads_summed += layer.heads if heads is None else len(heads)
        softmax = _softmax_of(call)
        device = call.query.device
        if self.with_gradients:
            # Under non-re-entrant checkpointing the layer's own saved tensors are dropped and come back by running the
            # layer again, without us. Ours are kept as they are, so that the two runs save the same.
            with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
                plan = self._plan(module, call)
                part = prompt_attention(self.region.shape, call, plan, softmax, heads)
                self._sum = part if self._sum is None else self._sum + part.to(self._sum.device)
            return
        # A buffer made under inference_mode could not be used in training later.
        with torch.inference_mode(False), torch.no_grad():
            if self._sum is None:
                self._sum = torch.zeros(self.region.shape, dtype=torch.float32, device=device)
            buffer = self._sum if self._sum.device == device else torch.zeros_like(self._sum, device=device)
            for piece in self._plan(module, call):
                add_prompt_attention(buffer, call, piece, softmax, heads)
            if buffer is not self._sum:
                self._sum.add_(buffer.to(self._sum.device))

    def _plan(self, module: nn.Module, call: Intercepted) -> list[Piece]:
        """Plan the pieces for this call's mask; worked out once for all layers that are handed the same mask."""
        options, causal = call.options, call.options.get("is_causal")
        causal = bool(getattr(module, "is_causal", True)) if causal is None else bool(causal)
        key: tuple[object, ...] = (
            id(call.mask), call.query.shape[2], call.key.shape[2], call.query.device, causal, call.implementation,
            call.logsumexp is None, options.get("sliding_window"), id(options.get("position_ids")),
            id(options.get("cu_seq_lens_k")),
        )  # fmt: skip
        if key not in self._plans:
            if len(self._plans) == _PLANS_KEPT:
                del self._plans[next(iter(self._plans))]
            with torch.no_grad():
                plan = plan_region(self.region, call, causal)
            # An address names a tensor only as long as it lives: those in the key are kept beside the plan.
            named = (call.mask, options.get("position_ids"), options.get("cu_seq_lens_k"))
            self._plans[key] = plan, named
        return self._plans[key][0]

    def _finish(self) -> None:
        assert self._sum is not None
        if self.with_gradients:
            with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
                self._attention = self.region.clear_padding(self._sum / self._heads_summed)
        else:
            with torch.inference_mode(False), torch.no_grad():
                self._attention = self.region.clear_padding(self._sum.div_(self._heads_summed))
        self._sum = None
        self._plans.clear()


def _softmax_of(call: Intercepted) -> Softmax:
    options = call.options
    if options.get("cache") is not None:
        raise AttentionError(
            "Prompt attention can't be read under continuous batching: use generate or a plain forward."
        )
    scaling, sinks = options.get("scaling"), options.get("s_aux")
    return Softmax(
        scaling=call.query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=options.get("softcap"),
        position_bias=options.get("position_bias"),
        sinks=options.get("sinks") if sinks is None else sinks,
    )


def _without(layers: str | Sequence[int], other: set[int], own: Sequence[int], images: bool) -> str | Sequence[int]:
    """Of layers named by their numbers, those that are not of the other kind; ConfigError where none is left."""
    names = layers.split(",") if isinstance(layers, str) else [str(number) for number in layers]
    if not all(name.strip().isdigit() for name in names):
        return layers
    kept = [int(name) for name in names if int(name) not in other]
    if not kept:
        raise ConfigError(
            f"attention.layers names no layer that looks at {'images' if images else 'the text'}: add one of "
            f"{', '.join(map(str, own))}."
        )
    return kept


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _refuse_unreadable(layers: str | Sequence[int], unreadable: set[int], model_type: str) -> None:
    """Refuse layers that exist but whose attention doesn't go through the interface: no typing error, but the model."""
    names = layers.split(",") if isinstance(layers, str) else [str(number) for number in layers]
    asked = {int(name) for name in names if name.strip().isdigit()}
    if refused := sorted(asked & unreadable):
        raise AttentionError(
            f"The attention of layers {', '.join(map(str, refused))} of a {model_type} model can't be read, because "
            f"they do not call transformers' attention interface: choose others, or all for those that do."
        )
