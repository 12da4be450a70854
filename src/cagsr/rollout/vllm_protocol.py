"""What is asked of vLLM's ``/v1/completions`` and what is made of its reply, as pure functions.

Prompts go as token ids and token ids come back: no text is tokenized twice, so the scoring pass scores the very tokens
that were sampled. The fields are vLLM's own (``vllm/entrypoints/openai/completion/protocol.py``), as TRL sends them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cagsr.config import SamplingConfig
from cagsr.errors import RolloutError


@dataclass(frozen=True)
class Question:
    """A prompt on its way to the engine."""

    row: int
    """Its row in the data, for messages."""
    ids: tuple[int, ...]


@dataclass(frozen=True)
class EngineAnswer:
    """An answer as the engine gives it."""

    ids: tuple[int, ...]
    """Token ids, the stop token included."""
    logprobs: tuple[float, ...]
    """Log-probability of each token under the distribution it was drawn from, nats."""
    ended: bool
    """It stopped by itself (not cut at the length limit)."""


def completion_request(
    model: str, questions: Sequence[Question], sampling: SamplingConfig, stop_ids: Sequence[int]
) -> dict[str, Any]:
    """The body of the request for ``sampling.num_generations`` answers to each question.

    Every setting that the server would otherwise take from the model's generation config is named, so that the sampled
    policy is the one the scoring pass knows. ``model`` is the server's name for it.
    """
    return {
        "model": model,
        "prompt": [list(question.ids) for question in questions],
        "n": sampling.num_generations,
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": sampling.min_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": list(sampling.stop_strings),
        "include_stop_str_in_output": True,
        "stop_token_ids": list(stop_ids),
        "logprobs": 0,  # of the sampled token alone
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


def check_room(questions: Sequence[Question], sampling: SamplingConfig, context: int | None, url: str) -> None:
    """Refuse prompts that don't fit the server's ``context`` (tokens; None: not told) together with the longest answer.

    RolloutError names the row of the first that doesn't.
    """
    if context is None:
        return
    for question in questions:
        if len(question.ids) + sampling.max_new_tokens > context:
            raise RolloutError(
                f"row {question.row}: its {len(question.ids)} tokens and {sampling.max_new_tokens} new ones exceed the "
                f"{context} tokens of the vLLM server at {url}: restart it with a larger --max-model-len, or lower "
                "--sampling.max_new_tokens or --data.max_prompt_length."
            )


def engine_answers(
    reply: Any, questions: Sequence[Question], sampling: SamplingConfig, stop_ids: Sequence[int], vocabulary: int
) -> list[EngineAnswer]:
    """Read and check the reply to ``completion_request``: ``num_generations`` answers to each question in a row.

    Raises RolloutError: something is missing, too many or too few tokens or answers, answers to another prompt, or token ids
    that the policy doesn't have.
    """
    number = sampling.num_generations
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or len(choices) != len(questions) * number:
        found = len(choices) if isinstance(choices, list) else "no"
        raise RolloutError(
            f"The vLLM server gave {found} answers instead of {len(questions) * number}: is another server running there?"
        )
    by_index = {choice.get("index"): choice for choice in choices if isinstance(choice, dict)}
    if by_index.keys() != set(range(len(choices))):
        raise RolloutError("The vLLM server's answers are not numbered from 0 on, so they can't be told apart.")
    return [
        _answer(by_index[index], questions[index // number], sampling, stop_ids, vocabulary)
        for index in range(len(choices))
    ]


def _answer(
    choice: dict[str, Any], question: Question, sampling: SamplingConfig, stop_ids: Sequence[int], vocabulary: int
) -> EngineAnswer:
    about = f"The vLLM server's answer to row {question.row}"
    ids, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
    if not isinstance(ids, list) or not isinstance(logprobs, list):
        raise RolloutError(
            f"{about} has no token ids or no log-probabilities: use a vLLM that TRL supports (0.22 or later)."
        )
    if choice.get("prompt_token_ids") != list(question.ids):
        raise RolloutError(f"{about} is an answer to other token ids: the server changes prompts, or mixes them up.")
    if len(ids) != len(logprobs) or not 1 <= len(ids) <= sampling.max_new_tokens:
        raise RolloutError(
            f"{about} has {len(ids)} tokens and {len(logprobs)} log-probabilities where 1 to {sampling.max_new_tokens} of "
            "each were asked for."
        )
    if any(not isinstance(number, int) or not 0 <= number < vocabulary for number in ids):
        raise RolloutError(
            f"{about} holds token ids outside the policy's vocabulary of {vocabulary}: the server runs another model."
        )
    if any(value is None or not math.isfinite(value) for value in logprobs):
        raise RolloutError(f"{about} holds a log-probability that is not a number.")
    return EngineAnswer(
        tuple(ids), tuple(float(value) for value in logprobs), _ended(about, choice, ids, sampling, stop_ids)
    )


def _ended(
    about: str, choice: dict[str, Any], ids: Sequence[int], sampling: SamplingConfig, stop_ids: Sequence[int]
) -> bool:
    """Whether the answer stopped by itself, and where it may stop."""
    reason = choice.get("finish_reason")
    if reason == "stop" and (ids[-1] in stop_ids or sampling.stop_strings):
        return True
    if reason == "length" and len(ids) == sampling.max_new_tokens:
        return False
    if reason == "stop":
        raise RolloutError(
            f"{about} ends with token {ids[-1]}, which is no stop token of the policy: the server runs another model, or "
            "another generation config (start it with --generation-config vllm)."
        )
    raise RolloutError(
        f"{about} was cut after {len(ids)} of {sampling.max_new_tokens} tokens (finish_reason {reason}): look at the "
        "server's log."
    )
