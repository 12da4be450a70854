"""Finished answers, given as text or tokens, as the model would have had to say them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cagsr.errors import DataError
from cagsr.flow import EncodedPrompt, EpisodeBatch
from cagsr.models.continuation import encode_continuation
from cagsr.models.load import LoadedModel
from cagsr.models.stops import turn_end
from cagsr.rollout.rows import prompt_batch


@dataclass(frozen=True)
class Response:
    """A finished answer."""

    text: str
    ids: tuple[int, ...]
    """Its tokens, the stop token included if it ended by itself."""
    ended: bool
    """It stopped by itself; False: it was cut."""


def encode_response(
    loaded: LoadedModel,
    prompt: EncodedPrompt,
    text: str,
    *,
    ended: bool = True,
    limit: int | None = None,
    ids: Sequence[int] | None = None,
) -> Response:
    """Turn an answer's text into the tokens the model would have had to say; none for a text without a token that is cut.

    They are those that ``sft`` and ``dpo`` train on (``models/continuation.py``): what can be written behind the prompt's
    own. The answer of an encoder-decoder is a text of its own. No special tokens are put in but the one that ends an
    answer: EOS, in a conversation the one that the chat template writes behind the assistant's turn; none where it has not
    ``ended``.

    An answer of more than ``limit`` tokens is cut to them and then unfinished. ``ids`` it was sampled as are taken as they
    are.
    """
    tokens = _tokens(loaded, prompt, text, ended) if ids is None else [int(token) for token in ids]
    if limit is not None and len(tokens) > limit:
        tokens, ended = tokens[:limit], False
    return Response(text, tuple(tokens), ended)


def stop_token(loaded: LoadedModel, prompt: EncodedPrompt) -> int:
    """The token with which the model ends an answer to this prompt."""
    end = None if prompt.prompt.messages is None else turn_end(loaded.tokenizer)
    if end is not None and end.stop is not None:
        return end.stop
    eos = loaded.tokenizer.eos_token_id
    return loaded.stop_ids[0] if eos is None else int(eos)


def _tokens(loaded: LoadedModel, prompt: EncodedPrompt, text: str, ended: bool) -> list[int]:
    messages = prompt.prompt.messages
    end = None if messages is None else turn_end(loaded.tokenizer)
    said = text
    if end is not None and messages is not None and text:
        if messages[-1]["role"] != "assistant" and not text.startswith(end.lead):
            said = end.lead + said
        if ended and not text.endswith((end.gap, end.marker)):
            said += end.gap
    ids = encode_continuation(loaded.tokenizer, loaded.architecture.text_before(prompt.prompt.text), said)
    stop = stop_token(loaded, prompt)
    # The end may be written in the text itself (or the tokenizer closes every text with it).
    while ids and ids[-1] in loaded.stop_ids:
        stop = ids.pop()
    return [*ids, stop] if text and ids and ended else ids


def answered(loaded: LoadedModel, prompts: Sequence[EncodedPrompt], responses: Sequence[Response]) -> EpisodeBatch:
    """Pad prompts and finished answers, one answer for each prompt; DataError, with the row, for an answer without a token."""
    for prompt, response in zip(prompts, responses, strict=True):
        if not response.ids:
            raise DataError(
                f"Row {prompt.prompt.row}: a response of zero tokens can't be scored; remove the row or mend it."
            )
        if loaded.vision is not None and loaded.vision.token_id in response.ids:
            raise DataError(
                f"Row {prompt.prompt.row}: the answer holds an image's token, which no answer can; remove the row or mend it."
            )
    width = max(len(response.ids) for response in responses)
    ids = torch.full((len(responses), width), loaded.pad_token_id, dtype=torch.int64)
    mask = torch.zeros((len(responses), width), dtype=torch.bool)
    for row, response in enumerate(responses):
        ids[row, : len(response.ids)] = torch.tensor(response.ids, dtype=torch.int64)
        mask[row, : len(response.ids)] = True
    ended = torch.tensor([response.ended for response in responses], dtype=torch.bool)
    texts = tuple(response.text for response in responses)
    device = loaded.device
    return EpisodeBatch.of_one_turn(
        prompt_batch(loaded, prompts), ids.to(device), mask.to(device), ended.to(device), texts
    )
