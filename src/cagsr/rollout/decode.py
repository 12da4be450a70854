"""The decoding loop of ``generate``, in which finished answers leave the batch and a prompt is read once.

transformers' own loop carries every row until the longest answer ends, and reads a prompt as often as there are answers
to it. This one is handed to ``generate`` as its ``custom_generate``, so that everything around it (caches, masks, logits
processors, stopping criteria) stays transformers'. It draws the same tokens as transformers' loop from the same seed:
one exponential variate for each row of the batch, present or gone, and each token of the vocabulary, and the largest
ratio of probability to variate wins, which is what ``torch.multinomial`` does.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput

from cagsr.errors import ModelError
from cagsr.models.lengths import length_borders, read_as_long_as
from cagsr.models.sharing import rows_can_be_picked
from cagsr.rollout.turn_keys import Layers, RowKeys, put_in, row_keys
from cagsr.rollout.variates import exponential_variates
from cagsr.support.progress import working

LEAVE_WHEN = 7 / 8
"""Rows leave when at most this share is still going: each time costs a copy of the cache."""
Variates = Callable[[int, Tensor, int], Tensor]
"""As ``exponential_variates``."""
Watch = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Told after each step of the rows held ``(rows,)`` int64, the token of each, and the model's logits ``(rows, vocabulary)`` it was
drawn from, before any setting changed them; gives ``(rows,)`` bool, which rows are over. Rows that are over, but not yet gone, are
among them."""
_BY_ROW = frozenset((
    "attention_mask", "decoder_attention_mask", "position_ids", "decoder_position_ids", "token_type_ids", "mm_token_type_ids",
    "cross_attention_mask",
))  # fmt: skip
_WIDER = frozenset(("position_ids", "cross_attention_mask"))
"""Those of them that may have more than rows and columns."""


def decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    answers_per_prompt: int = 1,
    together: bool = False,
    drawn: list[Tensor] | None = None,
    earlier: Layers = (),
    kept: list[RowKeys | None] | None = None,
    variates: Variates = exponential_variates,
    watch: Watch | None = None,
    images: Collection[str] = (),
    **model_kwargs: Any,
) -> Tensor:
    """Sample (or, without ``do_sample``, take the likeliest tokens of) several answers to each prompt.

    Where a row passes a length beyond which all its keys are others (``models/lengths.py``), it is read again as a long one:
    transformers' loop does that for Phi-3 alone, and for the whole batch at its longest row.

    Where the model's cache can't be picked apart by rows (state-space layers, caches of a fixed size), every row stays to
    the end; the tokens are the same.

    Arguments are as ``generate`` prepares them: ``input_ids`` ``(prompts, prompt)`` int64, for an encoder-decoder the decoder's
    first token. ``answers_per_prompt`` rows are made of each. With ``together`` it goes on until every process is done (each
    forward gathers weights that are sharded over processes). ``drawn`` is given the log-probability of each token drawn, under
    the distribution it was drawn from, ``(rows,)`` float32 a step; 0 for rows that have left. Without ``do_sample`` none is.
    ``earlier`` are the keys and values of the first columns of ``input_ids``; ``kept`` is given those of all that a row has read
    and said, row by row (``rollout/turn_keys.py``). ``variates`` are another source of luck, ``watch`` looks on and may end rows.
    ``images`` names the arguments that hold images: once read, they are in the keys and values.

    Gives ``(prompts * answers_per_prompt, prompt + response)`` int64, a prompt's answers in a row, filled up with padding.
    """
    encoder_decoder = bool(model.config.is_encoder_decoder)
    pad = generation_config._pad_token_tensor.to(input_ids.device)
    put_in(model_kwargs.get("past_key_values"), earlier)
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    total = input_ids.shape[0] * answers_per_prompt
    held = torch.arange(total, device=input_ids.device)
    prompt_of_row = held // answers_per_prompt
    logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)[prompt_of_row]
    model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=encoder_decoder)
    del outputs
    for name in (*images, "mm_encoder_outputs") if model_kwargs.get("use_cache") else ():
        model_kwargs.pop(name, None)
    pickable = _pickable(model_kwargs)
    if answers_per_prompt > 1:
        _pick(model_kwargs, prompt_of_row)
    rows = input_ids[prompt_of_row]
    result = rows
    going = torch.ones(total, dtype=torch.bool, device=input_ids.device)  # of the rows held
    ends = torch.full_like(held, 0)  # the columns of each row held up to its last token; 0: it goes on
    said: dict[int, RowKeys | None] = {}
    finished = False
    borders = () if encoder_decoder else length_borders(model)
    most = generation_config.max_length - input_ids.shape[1]
    with model._optimize_model_for_decode(), working("sampling", most, "tokens") as task:
        while True:
            if not finished:
                scores = logits_processor(rows, logits)
                if generation_config.do_sample:
                    probabilities = torch.softmax(scores, dim=-1)
                    # Drawn for the rows that have left too: the luck of an answer does not depend on when the others end.
                    luck = variates(total, held, probabilities.shape[1])
                    tokens = torch.div(probabilities, luck, out=luck).argmax(dim=-1)
                    if drawn is not None:
                        chosen = probabilities.gather(1, tokens[:, None])[:, 0].log()
                        drawn.append(chosen.new_zeros(total).index_copy(0, held, chosen))
                else:
                    tokens = scores.argmax(dim=-1)
                tokens = torch.where(going, tokens, pad)
                rows = torch.cat([rows, tokens[:, None]], dim=-1)
                column = torch.full_like(result[:, :1], int(pad))
                column[held, 0] = tokens
                result = torch.cat([result, column], dim=-1)
                task.advance()
                stopped = going & stopping_criteria(rows, None)
                if watch is not None:
                    stopped |= going & watch(held, tokens, logits)
                ends = torch.where(stopped, rows.shape[1], ends)
                going = going & ~stopped
                alive = int(going.sum())
                finished = alive == 0
                leave = pickable and 0 < alive <= LEAVE_WHEN * len(held)
                if kept is not None and (leave or finished):
                    said |= _said(model_kwargs, rows, ends, held)
                if leave:
                    staying = going.nonzero()[:, 0]
                    _pick(model_kwargs, staying)
                    rows, held, going, ends = rows[staying], held[staying], going[staying], ends[staying]
            if not model._has_unfinished_sequences(finished, together, device=input_ids.device):
                if kept is not None:
                    kept += [said.get(row) for row in range(total)]
                return result
            step = 1 if model_kwargs.get("use_cache") else None
            if borders and step:
                _read_again_across(borders, model, rows, model_kwargs)
            inputs = model.prepare_inputs_for_generation(rows, next_sequence_length=step, **model_kwargs)
            outputs = model(**inputs, return_dict=True)
            model_kwargs = model._update_model_kwargs_for_generation(
                outputs, model_kwargs, is_encoder_decoder=encoder_decoder
            )
            logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
            del outputs


def _said(model_kwargs: dict[str, Any], rows: Tensor, ends: Tensor, held: Tensor) -> dict[int, RowKeys | None]:
    """The keys of the rows that have ended, by their numbers; ``(rows,)`` ``ends`` are their columns, 0 where they go on."""
    mask = model_kwargs.get("attention_mask")  # generate drops it where nothing is padded
    real = torch.ones_like(rows, dtype=torch.bool) if mask is None else mask.bool()[:, : rows.shape[1]]
    found: dict[int, RowKeys | None] = {}
    for place, (number, end) in enumerate(zip(held.tolist(), ends.tolist(), strict=True)):
        if end:
            row = rows[place, :end], real[place, :end]
            found[number] = row_keys(model_kwargs["past_key_values"], place, *row)
    return found


def _read_again_across(
    borders: tuple[int, ...], model: PreTrainedModel, rows: Tensor, model_kwargs: dict[str, Any]
) -> None:
    """Make the cached keys of the rows anew whose newest token passes a border; it is not cached yet itself."""
    mask, cache = model_kwargs["attention_mask"], model_kwargs["past_key_values"]
    lengths = mask.sum(dim=1)
    passed = torch.isin(lengths, torch.tensor(borders, device=lengths.device) + 1).nonzero()[:, 0]
    if not len(passed):
        return
    if not rows_can_be_picked(cache):
        raise ModelError(
            f"{max(borders) + 1} tokens: the keys of this {model.config.model_type} model change with its length, and its "
            f"{type(cache).__name__} can't be made anew row by row; ask for prompts and answers of at most {borders[0]} tokens."
        )
    seen = mask[passed, :-1]
    positions = (seen.cumsum(dim=1) - 1).clamp(min=0)
    last_logits = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    with read_as_long_as(lengths[passed]):
        read = model(
            input_ids=rows[passed, :-1], attention_mask=seen, position_ids=positions, use_cache=True, **last_logits
        )
    for layer, other in zip(cache.layers, read.past_key_values.layers, strict=True):
        for name in ("keys", "values", "indexer_keys"):  # rows come first in all of them
            if isinstance(kept := getattr(layer, name, None), Tensor):
                kept[passed] = getattr(other, name)


def _pickable(model_kwargs: dict[str, Any]) -> bool:
    """Whether everything the forward is handed can be cut to some of its rows."""
    for name, value in model_kwargs.items():
        if isinstance(value, Tensor) and value.dim() != 2 and name not in _WIDER:
            return False
        if isinstance(value, Tensor) and name not in _BY_ROW:
            return False
        if isinstance(value, Cache) and not rows_can_be_picked(value):
            return False
    return True


def _pick(model_kwargs: dict[str, Any], index: Tensor) -> None:
    """Keep (or repeat) the rows ``index`` of all that belongs to rows."""
    for name, value in model_kwargs.items():
        if isinstance(value, Tensor):
            # Positions of several axes (M-RoPE) have their rows behind them.
            several = name == "position_ids" and value.dim() == 3
            model_kwargs[name] = value[:, index] if several else value[index]
        elif isinstance(value, Cache):
            value.reorder_cache(index)  # what batch_select_indices does, and state-space layers have it too
        elif isinstance(value, ModelOutput):
            model_kwargs[name] = type(value)(
                **{key: part[index] if isinstance(part, Tensor) else part for key, part in value.items()}
            )
