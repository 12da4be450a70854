"""Sample answers with transformers' ``generate`` and cut them at the first stop token."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from cagsr.config import SamplingConfig
from cagsr.flow import EpisodeBatch, PromptBatch
from cagsr.models.checkpointing import without_checkpointing
from cagsr.models.generation import sampled_with
from cagsr.models.load import LoadedModel
from cagsr.models.merged import merged_adapters
from cagsr.rollout.decode import Variates, Watch, decode
from cagsr.rollout.turn_keys import Layers, RowKeys, TurnKeys, can_go_on, lay_out
from cagsr.rollout.variates import exponential_variates


def sample_responses(
    loaded: LoadedModel,
    prompts: PromptBatch,
    sampling: SamplingConfig,
    batch_size: int | None = None,
    keys: TurnKeys | None = None,
    variates: Variates = exponential_variates,
    watch: Watch | None = None,
) -> EpisodeBatch:
    """Sample one answer for each row of a prompt batch, padded on the right to the longest.

    The model's own generation defaults (a repetition penalty, say) are switched off, so that the sampled policy is the
    softmax at ``temperature`` (0 is greedy); what top-p, top-k, the minimum length and forbidden tokens change is corrected in
    the scoring pass (``models/generation.py``). A first token that an encoder-decoder model forces is no part of the answer.
    ``batch_size`` answers are in memory at once, all those to a prompt at least; None: all.

    ``keys``: of what each row's prompt begins with, which is not read again; it then holds those of prompt and answer. Nothing is
    kept where the answers don't fit into memory at once, or the model can't go on from keys.

    ``variates`` and ``watch`` as :func:`~cagsr.rollout.decode.decode` takes them, who count the rows in memory at once. An answer
    that ``watch`` ends is longer here, by padding, wherever others go on: it knows where it ended.
    """
    many = _answers_per_prompt(prompts)
    per_batch = len(prompts.ids) if batch_size is None else max(1, batch_size // many) * many
    base = loaded.model.get_base_model() if hasattr(loaded.model, "get_base_model") else loaded.model
    ids_read, real_read = prompts.ids, prompts.real
    earlier: Layers = ()
    kept: list[RowKeys | None] | None = None
    with without_checkpointing(loaded.model), loaded.autocast():
        goes_on = keys is not None and len(prompts.ids) <= per_batch and can_go_on(base)
    if keys is not None and goes_on:
        laid = lay_out(prompts.ids, prompts.real, keys, loaded.pad_token_id, sampling.max_new_tokens)
        if laid is not None:
            ids_read, real_read, earlier = laid.ids, laid.real, laid.layers
        kept = []
    start = loaded.architecture.answer_start(loaded.model, ids_read.shape[1])
    stop_ids, stop_strings = loaded.stops(sampling)
    settings = _only_these_settings(loaded.model, sampled_with(loaded, sampling))
    says_stop = [SaysStopString(loaded.text_of, stop_strings, start)] if stop_strings else []
    ids, logprobs = [], []
    with (
        torch.no_grad(),
        loaded.autocast(),
        without_checkpointing(loaded.model),
        merged_adapters(loaded.model),
        settings,
    ):
        for at in range(0, len(ids_read), per_batch):
            drawn: list[Tensor] = []
            rows = slice(at, at + per_batch, many)
            found = loaded.architecture.generate(
                loaded.model,
                ids_read[rows],
                real_read[rows],
                None if prompts.images is None else prompts.images[rows],
                custom_generate=decode,
                answers_per_prompt=many,
                drawn=drawn,
                earlier=earlier,
                kept=kept,
                variates=variates,
                watch=watch,
                stopping_criteria=StoppingCriteriaList(says_stop),
            )
            ids.append(found[:, start:])
            logprobs += [torch.stack(drawn, dim=1)] if drawn else []
    if keys is not None:
        keys.rows = kept or []
    rollout = cut_responses(_stacked(ids, loaded.pad_token_id), prompts, loaded, stop_ids, stop_strings)
    if not logprobs:
        return rollout
    mask, forced = rollout.sampled, len(loaded.generation.forced)  # a forced token is drawn, but is no answer's
    decoded = _stacked(logprobs, 0.0)[:, forced : forced + mask.shape[1]]
    return replace(rollout, decoded_logprobs=decoded.masked_fill(~mask, 0.0))


def _stacked(parts: Sequence[Tensor], fill: float) -> Tensor:
    """Rows of several batches below each other, ``(rows, longest)``."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([nn.functional.pad(part, (0, longest - part.shape[1]), value=fill) for part in parts])


class SaysStopString(StoppingCriteria):
    """Ends an answer whose last tokens say one of the stop strings; works with every tokenizer that can decode.

    transformers' own criterion takes the vocabulary apart and fails on tokenizers of whole words. ``start`` is where answers
    begin: a prompt may say a stop string.
    """

    def __init__(self, text_of: Callable[[Sequence[int]], str], stop_strings: Sequence[str], start: int) -> None:
        self._text_of = text_of
        self._stop_strings = tuple(stop_strings)
        self._start = start
        # A token is at least a character but for pieces of one, which come in fours at most.
        self._tokens = 4 + max(len(stop.encode()) for stop in stop_strings)

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs: object) -> Tensor:
        """``(rows,)`` bool: whether the text of each row's last tokens holds a stop string."""
        first = max(self._start, input_ids.shape[1] - self._tokens)
        texts = [self._text_of(ids) for ids in input_ids[:, first:].tolist()]
        found = [any(stop in text for stop in self._stop_strings) for text in texts]
        return torch.tensor(found, device=input_ids.device)


def _answers_per_prompt(prompts: PromptBatch) -> int:
    """How many rows in a row answer the same prompt; 1 where that differs from prompt to prompt."""
    group = prompts.group
    many = int((group == group[0]).sum())
    if len(group) % many:
        return 1
    blocks = group.view(-1, many)
    apart = len(blocks[:, 0].unique()) == len(blocks)
    return many if apart and bool((blocks == blocks[:, :1]).all()) else 1


def cut_responses(
    ids: Tensor,
    prompts: PromptBatch,
    loaded: LoadedModel,
    stop_ids: Sequence[int],
    stop_strings: Sequence[str] = (),
) -> EpisodeBatch:
    """Cut continuations ``(batch, length)`` int64 at their first stop token or the token that completes a stop string (both
    kept).

    Stop strings are left out of ``completions``, as stop tokens are. The rollout is cut to the longest answer, at least one
    position wide.
    """
    batch, length = ids.shape
    lengths = torch.full((batch,), length, dtype=torch.long, device=ids.device)
    ended = torch.zeros(batch, dtype=torch.bool, device=ids.device)
    if length:
        is_stop = torch.isin(ids, torch.tensor(list(stop_ids), device=ids.device))
        has_stop = is_stop.any(dim=1)
        lengths = torch.where(has_stop, is_stop.int().argmax(dim=1) + 1, lengths)
        ended = has_stop
    completions = []
    for row in range(batch):
        tokens = ids[row, : int(lengths[row])].tolist()
        # A stop token need not be a special one, which decoding leaves out.
        text = loaded.text_of(tokens[:-1] if ended[row] else tokens)
        cut = [text.find(stop) for stop in stop_strings if stop in text]
        if cut:
            lengths[row] = _tokens_until(tokens, stop_strings, loaded)
            ended[row] = True
            text = text[: min(cut)]
        completions.append(text)
    width = max(1, int(lengths.max()) if batch else 1)
    positions = torch.arange(width, device=ids.device)
    mask = positions[None, :] < lengths[:, None]
    padded = torch.nn.functional.pad(ids, (0, max(0, width - length)))[:, :width]
    response = padded.masked_fill(~mask, loaded.pad_token_id)
    return EpisodeBatch.of_one_turn(prompts, response, mask, ended, tuple(completions))


def _tokens_until(tokens: list[int], stop_strings: Sequence[str], loaded: LoadedModel) -> int:
    """How many tokens it takes until the decoded text holds a stop string (bisection: the text only grows)."""

    def says_stop(count: int) -> bool:
        text = loaded.text_of(tokens[:count])
        return any(stop in text for stop in stop_strings)

    return 1 + bisect_left(range(1, len(tokens)), True, key=says_stop)


@contextmanager
def _only_these_settings(model: nn.Module, settings: GenerationConfig) -> Iterator[None]:
    """Make ``settings`` the model's own for a while: generate fills whatever is unset from the model's."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    previous = base.generation_config
    base.generation_config = settings
    try:
        yield
    finally:
        base.generation_config = previous
