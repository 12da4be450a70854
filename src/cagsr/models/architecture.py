"""The kinds of language models behind one interface: everything in which decoder-only and encoder-decoder models, and those that
hear, differ.

Whoever samples, scores, reads attention or saves asks ``LoadedModel.architecture``; nobody else asks which kind a model is.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PretrainedConfig, PreTrainedTokenizerBase

from cagsr.attention.region import AttentionRegion
from cagsr.flow import ImageInputs
from cagsr.models.decoder_only import DecoderOnly, of_batch
from cagsr.models.encoder_decoder import EncoderDecoder
from cagsr.models.hearing import KNOWN
from cagsr.models.inputs import PassInputs
from cagsr.models.speech_to_text import SpeechToText


class Architecture(Protocol):
    """A kind of language model: how prompt and answer go in, and where what is read of them comes out."""

    padding_side: ClassVar[Literal["left", "right"]]
    """Where prompts are padded."""
    one_sequence: ClassVar[bool]
    """Prompt and answer are one sequence of tokens, and all that the model reads."""
    shares_context: ClassVar[bool]
    """Prompt and answer share the model's positions."""
    peft_task: ClassVar[str | None]
    """Peft's task type; None: its plain class."""

    @property
    def auto_class(self) -> Any:
        """Transformers' class that loads such a model."""

    @property
    def pipeline_tag(self) -> str:
        """The Hub's name for what such a model does."""

    def rows_fed(self, model: nn.Module, inputs: PassInputs) -> tuple[PassInputs, Tensor | None]:
        """The rows that the model is fed, and ``(batch, response)`` which of them holds each token; None: those of the batch."""

    def logits(self, model: nn.Module, fed: PassInputs, pad_token_id: int) -> Tensor:
        """Logits ``(rows, response or more, vocabulary)`` of one pass; the last ones predict the response tokens."""

    def hidden(self, seen: Sequence[Tensor], fed: PassInputs) -> Tensor:
        """Last hidden states ``(rows, response or more, width)`` of what the output head was handed, forward by forward."""

    def regions(self, model: nn.Module, inputs: PassInputs) -> list[AttentionRegion]:
        """Which attention to read of each forward of a pass, in their order."""

    def attention(self, model: nn.Module, inputs: PassInputs, read: Sequence[Tensor]) -> Tensor:
        """Put together what was read in ``regions``: ``(batch, response, prompt)`` float32, zero on padding."""

    def image_regions(self, model: nn.Module, inputs: PassInputs) -> list[AttentionRegion]:
        """Which cross-attention to images or sounds to read of each forward of a pass, with pieces of a region added up."""

    def generate(
        self, model: nn.Module, ids: Tensor, real: Tensor, images: Sequence[ImageInputs | None] | None, **options: Any
    ) -> Tensor:
        """Transformers' ``generate`` for prompts ``ids`` ``(prompts, prompt)`` int64, real where ``real`` is, with their images or
        sounds; ``options`` go to it.
        """

    def answer_start(self, model: nn.Module, prompt_width: int) -> int:
        """Columns of what ``generate`` returns that stand before the answer."""

    def text_before(self, prompt: str) -> str:
        """The text that an answer's tokens are written behind."""

    def text_of(self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
        """An answer's tokens as text, special tokens left out."""


def architecture_of(config: PretrainedConfig) -> Architecture:
    """Which kind of model a transformers config describes."""
    if config.model_type in KNOWN:
        return SpeechToText()
    if config.is_encoder_decoder:
        return EncoderDecoder()
    return DecoderOnly(sees=hasattr(config, "vision_config") and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)


def teacher_forced(
    model: nn.Module,
    architecture: Architecture,
    inputs: PassInputs,
    pad_token_id: int,
    *,
    with_hidden: bool = False,
    with_logits: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """One pass over prompt and response, the sampled tokens as input.

    Gives logits ``(batch, response, vocabulary)`` at the positions that predict each response token and, ``with_hidden``,
    the input of the output embedding (the last hidden state), ``(batch, response, width)``. Without ``with_logits`` only
    that is wanted: no time and memory goes into logits, which are of no position.
    """
    seen: list[Tensor] = []

    def before_output_embedding(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        # Its own input: the last hidden state after the final norm (and T5's scaling), without output_hidden_states,
        # which would keep every layer's.
        seen.append(args[0])
        return None if with_logits else (args[0][:, :0],)

    fed, held_by = architecture.rows_fed(model, inputs)
    with ExitStack() as stack:
        if with_hidden:
            stack.callback(model.get_output_embeddings().register_forward_pre_hook(before_output_embedding).remove)
        logits = architecture.logits(model, fed, pad_token_id)
    length = inputs.response_ids.shape[1]
    logits = of_batch(logits[:, -length:], held_by)
    return logits, of_batch(architecture.hidden(seen, fed)[:, -length:], held_by) if seen else None
