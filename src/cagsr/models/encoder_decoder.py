"""Encoder-decoder models: the prompt is the encoder's input, read once for its answers; the answer is the decoder's."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerBase

from cagsr.attention.region import AttentionRegion
from cagsr.errors import ModelError
from cagsr.flow import ImageInputs
from cagsr.models.generation import decoder_prefix
from cagsr.models.inputs import PassInputs
from cagsr.models.lengths import length_borders


class EncoderDecoder:
    """See :class:`~cagsr.models.architecture.Architecture`."""

    padding_side: ClassVar[Literal["left", "right"]] = "right"
    one_sequence: ClassVar[bool] = False
    shares_context: ClassVar[bool] = False
    auto_class: ClassVar[Any] = AutoModelForSeq2SeqLM
    peft_task: ClassVar[str | None] = "SEQ_2_SEQ_LM"
    pipeline_tag: ClassVar[str] = "text2text-generation"

    def rows_fed(self, model: nn.Module, inputs: PassInputs) -> tuple[PassInputs, Tensor | None]:
        """The rows of the batch."""
        return inputs, None

    def logits(self, model: nn.Module, fed: PassInputs, pad_token_id: int) -> Tensor:
        """One forward: the response, shifted right behind ``decoder_prefix``, is the decoder's input."""
        if (borders := length_borders(model)) and fed.response_ids.shape[1] > borders[0]:
            raise ModelError(
                f"Answers of {fed.response_ids.shape[1]} tokens: the decoder of this {model.config.model_type} model changes "
                f"its rotary frequencies beyond {borders[0]} tokens, which is read of decoder-only models alone; "
                "ask for shorter ones."
            )
        response = fed.response_ids.masked_fill(~fed.response_real, pad_token_id)
        before = response.new_tensor(decoder_prefix(model)).expand(len(response), -1)
        decoder_ids = torch.cat([before, response[:, :-1]], dim=1)
        decoder_mask = torch.cat([torch.ones_like(before, dtype=torch.bool), fed.response_real[:, :-1]], dim=1)
        encoder: dict[str, Any] = {"input_ids": fed.prompt_ids}
        if fed.shared is not None:
            first = fed.shared.first
            output = model.get_encoder()(input_ids=fed.prompt_ids[first], attention_mask=fed.prompt_real[first].long())
            output.last_hidden_state = output.last_hidden_state.index_select(0, fed.shared.of_row)
            encoder = {"encoder_outputs": output}
        return model(
            **encoder,
            attention_mask=fed.prompt_real.long(),
            decoder_input_ids=decoder_ids,
            decoder_attention_mask=decoder_mask.long(),
            use_cache=False,
        ).logits

    def hidden(self, seen: Sequence[Tensor], fed: PassInputs) -> Tensor:
        """Of the decoder's one forward."""
        return seen[0]

    def regions(self, model: nn.Module, inputs: PassInputs) -> list[AttentionRegion]:
        """The cross-attention of the decoder's one forward."""
        prefix = len(decoder_prefix(model))
        return [AttentionRegion.encoder_decoder(inputs.prompt_real, inputs.rows_read, prefix)]

    def attention(self, model: nn.Module, inputs: PassInputs, read: Sequence[Tensor]) -> Tensor:
        """What was read."""
        return read[0]

    def image_regions(self, model: nn.Module, inputs: PassInputs) -> list[AttentionRegion]:
        """None: its prompts are texts."""
        return []

    def generate(
        self, model: nn.Module, ids: Tensor, real: Tensor, images: Sequence[ImageInputs | None] | None, **options: Any
    ) -> Tensor:
        """The prompts are the encoder's."""
        return model.generate(input_ids=ids, attention_mask=real.long(), **options)

    def answer_start(self, model: nn.Module, prompt_width: int) -> int:
        """Behind the start token and a forced one."""
        return len(decoder_prefix(model))

    def text_before(self, prompt: str) -> str:
        """Nothing: an answer is a text of its own."""
        return ""

    def text_of(self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
        """As any text."""
        return str(tokenizer.decode(ids, skip_special_tokens=True))
