"""The two kinds of language models behind one interface: everything in which decoder-only and encoder-decoder models differ.

Whoever samples, scores, reads attention or saves asks ``LoadedModel.architecture``; nobody else asks which kind a model is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from cagsr.attention.region import AttentionRegion
from cagsr.models.decoder_only import DecoderOnly
from cagsr.models.encoder_decoder import EncoderDecoder
from cagsr.models.inputs import PassInputs


class Architecture(Protocol):
    """A kind of language model: how prompt and answer go in, and where what is read of them comes out."""

    @property
    def padding_side(self) -> Literal["left", "right"]:
        """Where prompts are padded."""
        ...

    @property
    def one_sequence(self) -> bool:
        """Prompt and answer are one sequence of tokens, which share the model's context."""
        ...

    @property
    def auto_class(self) -> Any:
        """Transformers' class that loads such a model."""
        ...

    @property
    def peft_task(self) -> str:
        """Peft's task type."""
        ...

    @property
    def pipeline_tag(self) -> str:
        """The Hub's name for what such a model does."""
        ...

    def rows_fed(self, model: nn.Module, inputs: PassInputs) -> tuple[PassInputs, Tensor | None]:
        """The rows that the model is fed, and ``(batch, response)`` which of them holds each token; None: those of the batch."""
        ...

    def logits(self, model: nn.Module, fed: PassInputs, pad_token_id: int) -> Tensor:
        """Logits ``(rows, response or more, vocabulary)`` of one pass; the last ones predict the response tokens."""
        ...

    def hidden(self, seen: Sequence[Tensor], fed: PassInputs) -> Tensor:
        """Last hidden states ``(rows, response or more, width)`` of what the output head was handed, forward by forward."""
        ...

    def regions(self, model: nn.Module, inputs: PassInputs) -> list[AttentionRegion]:
        """Which attention to read of each forward of a pass, in their order."""
        ...

    def attention(self, model: nn.Module, inputs: PassInputs, read: Sequence[Tensor]) -> Tensor:
        """Put together what was read in ``regions``: ``(batch, response, prompt)`` float32, zero on padding."""
        ...

    def answer_start(self, model: nn.Module, prompt_width: int) -> int:
        """Columns of what ``generate`` returns that stand before the answer."""
        ...

    def text_before(self, prompt: str) -> str:
        """The text that an answer's tokens are written behind."""
        ...

    def text_of(self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
        """An answer's tokens as text, special tokens left out."""
        ...


def architecture_of(config: PretrainedConfig) -> Architecture:
    """Which kind of model a transformers config describes."""
    return EncoderDecoder() if config.is_encoder_decoder else DecoderOnly()
