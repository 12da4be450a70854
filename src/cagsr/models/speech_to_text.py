"""Models that hear (Whisper): the sound is the encoder's input, encoded once for its answers; prompt and answer are the decoder's.

The prompt's tokens are those that open a transcript, with a text before them where the user gives one. They stand before the
answer as a decoder-only model's do, padded on the left; what an answer looks at of the sound is read of the cross-attention.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForSpeechSeq2Seq, GenerationMixin, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from cagsr.attention.probe import silence
from cagsr.attention.region import AttentionRegion
from cagsr.errors import ModelError
from cagsr.flow import ImageInputs
from cagsr.models.image_arguments import padded_places, stacked
from cagsr.models.inputs import PassInputs


class SpeechToText:
    """See :class:`~cagsr.models.architecture.Architecture`."""

    padding_side: ClassVar[Literal["left", "right"]] = "left"
    one_sequence: ClassVar[bool] = False
    shares_context: ClassVar[bool] = True
    auto_class: ClassVar[Any] = AutoModelForSpeechSeq2Seq
    peft_task: ClassVar[str | None] = None  # peft's own classes hand the encoder token ids
    pipeline_tag: ClassVar[str] = "automatic-speech-recognition"

    def rows_fed(self, model: nn.Module, inputs: PassInputs) -> tuple[PassInputs, Tensor | None]:
        """The rows of the batch."""
        return inputs, None

    def logits(self, model: nn.Module, fed: PassInputs, pad_token_id: int) -> Tensor:
        """One forward of the decoder over prompt and answer; positions count real tokens only."""
        response = fed.response_ids.masked_fill(~fed.response_real, pad_token_id)[:, :-1]
        mask = torch.cat([fed.prompt_real, fed.response_real[:, :-1]], dim=1).long()
        return model(
            **_read(model, fed),
            decoder_input_ids=torch.cat([fed.prompt_ids, response], dim=1),
            decoder_attention_mask=mask,
            decoder_position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
        ).logits

    def hidden(self, seen: Sequence[Tensor], fed: PassInputs) -> Tensor:
        """Of the decoder's one forward."""
        return seen[0]

    def regions(self, model: nn.Module, inputs: PassInputs) -> list[AttentionRegion]:
        """The decoder's attention to the prompt's tokens."""
        return [AttentionRegion.left_padded(inputs.prompt_real, inputs.rows_read, inputs.looked_at)]

    def attention(self, model: nn.Module, inputs: PassInputs, read: Sequence[Tensor]) -> Tensor:
        """What was read."""
        return read[0]

    def image_regions(self, model: nn.Module, inputs: PassInputs) -> list[AttentionRegion]:
        """The same rows, which look at the sound's states."""
        assert inputs.images is not None
        (region,) = self.regions(model, inputs)
        return [region.looking_at(*padded_places(inputs.images, None))]

    def generate(
        self, model: nn.Module, ids: Tensor, real: Tensor, images: Sequence[ImageInputs | None] | None, **options: Any
    ) -> Tensor:
        """By transformers' general ``generate``: Whisper's own cuts long sounds up and writes times."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        read = (
            {"encoder_outputs": _silence(base, len(ids))} if images is None else {"input_features": _features(images)}
        )
        return GenerationMixin.generate(
            base, **read, decoder_input_ids=ids, decoder_attention_mask=real.long(), **options
        )

    def answer_start(self, model: nn.Module, prompt_width: int) -> int:
        """Behind the prompt."""
        return prompt_width

    def text_before(self, prompt: str) -> str:
        """Nothing: behind the tokens that open it a transcript is a text of its own."""
        return ""

    def text_of(self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
        """As any text."""
        return str(tokenizer.decode(ids, skip_special_tokens=True))


def _read(model: nn.Module, fed: PassInputs) -> dict[str, Any]:
    """What the encoder reads of each row; of shared prompts its states, made once for their answers."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if fed.images is None:
        return {"encoder_outputs": _silence(base, len(fed.prompt_ids))}
    if fed.shared is None:
        return {"input_features": _features(fed.images)}
    output = base.get_encoder()(_features([fed.images[row] for row in fed.shared.first.tolist()]))
    output.last_hidden_state = output.last_hidden_state.index_select(0, fed.shared.of_row)
    return {"encoder_outputs": output}


def _silence(base: Any, rows: int) -> BaseModelOutput:
    """Empty states, for texts by which a model is asked how it works or a saved one is compared; a user's prompt has a sound."""
    return BaseModelOutput(last_hidden_state=silence(base).last_hidden_state.expand(rows, -1, -1))


def _features(images: Sequence[ImageInputs | None]) -> Tensor:
    if any(one is None for one in images):
        raise ModelError("A prompt without a sound, which is all that a model that hears can answer.")
    return stacked(images)["input_features"]
