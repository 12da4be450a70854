"""The attention reward as a reward manager of verl, and as the one worker that holds the reference model for all of them.

verl starts several reward workers (``reward.num_workers``), each with a manager of its own, and asks them for one answer at a
time. Here they all hand over what verl hands them, token ids included, to one Ray actor with the frozen model
(:mod:`cagsr.integrations.frozen`), on a share of a GPU if it is given one; what arrives while it computes is judged together.

Names no class of verl's: a manager is what has ``run_single`` and ``assemble_rm_scores``. verl finds this one by
``reward.reward_manager.source=importlib``, its ``name``, and ``module.path=pkg://cagsr.integrations.verl_worker``.
"""

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cagsr.errors import CagsrError, DataError
from cagsr.flow import EncodedPrompt
from cagsr.integrations.frozen import VARIABLE, FrozenScorer, frozen_scorer
from cagsr.integrations.prompts import GivenPrompt
from cagsr.scoring.answers import Response, stop_token


class Asked(NamedTuple):
    """An answer to be judged, as verl sampled it."""

    prompt: GivenPrompt
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


class RewardWorker:
    """Holds the frozen model and judges together what is asked at the same time.

    Raises what :func:`~cagsr.integrations.frozen.frozen_scorer` does for the settings in the YAML file ``path``.
    """

    def __init__(self, path: str | None = None) -> None:
        self._scorer = frozen_scorer(path)
        self._waiting: list[tuple[Asked, asyncio.Future[dict[str, float]]]] = []
        self._work: asyncio.Task[None] | None = None

    async def judge(self, asked: Asked) -> dict[str, float]:
        """``score``, the weighted sum of the terms (raw, or on a run's scales), and each raw term by its name.

        Raises DataError: a prompt that can't be used, or that verl has made other tokens of; RewardError: a term fails.
        """
        answer: asyncio.Future[dict[str, float]] = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, answer))
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._judge_waiting())
        return await answer

    async def _judge_waiting(self) -> None:
        while self._waiting:
            some, self._waiting = self._waiting, []
            found = await asyncio.to_thread(self._judged, [asked for asked, _ in some])
            for (_, answer), one in zip(some, found, strict=True):
                if answer.done():  # who asked has gone
                    continue
                if isinstance(one, CagsrError):
                    answer.set_exception(one)
                else:
                    answer.set_result(one)

    def _judged(self, asked: Sequence[Asked]) -> list[dict[str, float] | CagsrError]:
        """What each is worth, or why it can't be said: one that is wrong does not spoil the others."""
        found: dict[int, dict[str, float] | CagsrError] = {}
        usable = {}
        for number, one in enumerate(asked):
            try:
                usable[number] = (_prompt(self._scorer, one), one)
            except CagsrError as error:
                found[number] = error
        try:
            if usable:
                prompts = [prompt for prompt, _ in usable.values()]
                responses = [_response(self._scorer, prompt, one.answer_ids) for prompt, one in usable.values()]
                total, terms = self._scorer.terms(prompts, responses)
                for row, number in enumerate(usable):
                    values = {name: float(column[row]) for name, column in terms.items()}
                    found[number] = {"score": float(total[row]), **values}
        except CagsrError as error:
            found |= dict.fromkeys(usable, error)
        return [found[number] for number in range(len(asked))]


def _prompt(scorer: FrozenScorer, asked: Asked) -> EncodedPrompt:
    """The prompt with its salient words, which are found in its text: its tokens must be those that verl sampled behind."""
    encoded = scorer.encoder.encode(asked.prompt)
    if encoded.ids != asked.prompt_ids:
        raise DataError(
            f"the prompt {encoded.prompt.text[:60]!r} has {len(encoded.ids)} tokens for {scorer.loaded.path}, and verl has made "
            f"{len(asked.prompt_ids)} others of it: name a model of the same tokenizer and chat template in the reward's "
            "settings, and leave data.apply_chat_template_kwargs and the truncation of prompts out."
        )
    return encoded


def _response(scorer: FrozenScorer, prompt: EncodedPrompt, ids: tuple[int, ...]) -> Response:
    """The answer as it was sampled; one of no token is one that stopped at once."""
    tokens = ids or (stop_token(scorer.loaded, prompt),)
    return Response(scorer.loaded.text_of(tokens), tokens, tokens[-1] in scorer.loaded.stop_ids)


class AttentionRewardManager:
    """What verl's reward worker asks for the reward of an answer; the model is in a :class:`RewardWorker`.

    Of ``config.reward.reward_kwargs`` it takes ``config``, the path of the YAML file (else the environment variable
    ``CAGSR_REWARD_CONFIG``), and ``num_gpus``, the share of a GPU that the worker gets (0: it computes on the CPU). Outside of
    Ray the manager holds the model itself.
    """

    def __init__(self, config: Any, tokenizer: Any = None, compute_score: Any = None, **router: Any) -> None:
        """As verl calls it; a reward function, and verl's own reward model, are not asked."""
        settings = config.reward.get("reward_kwargs") or {}
        named = settings.get("config") or os.environ.get(VARIABLE)
        path = None if not named else str(Path(str(named)).absolute())
        actor = _actor(path, float(settings.get("num_gpus", 0)))
        self._judge: Callable[[Asked], Awaitable[dict[str, float]]] = (
            RewardWorker(path).judge if actor is None else actor.judge.remote
        )

    async def run_single(self, data: Any) -> dict[str, Any]:
        """Judge the (last) answer of a verl ``DataProto``.

        Gives ``reward_score``, and in ``reward_extra_info`` each term by its name, raw, which verl logs. Raises what
        :meth:`RewardWorker.judge` does; DataError for an answer of several turns.
        """
        found = await self._judge(asked_of(data[-1]))
        return {"reward_score": found["score"], "reward_extra_info": found}

    @classmethod
    def assemble_rm_scores(cls, data: Any, scores: Sequence[float]) -> Tensor:
        """Rewards ``(batch, response)`` float32: each answer's, at its last token."""
        rewards = torch.zeros_like(data.batch["responses"], dtype=torch.float32)
        lengths = data.batch["attention_mask"][:, data.batch["prompts"].shape[1] :].sum(dim=1)
        last = (lengths - 1).clamp(min=0)[:, None]
        return rewards.scatter(1, last, torch.tensor(scores, dtype=torch.float32)[:, None])


def asked_of(item: Any) -> Asked:
    """The prompt and the sampled tokens of one row of a DataProto, without its padding.

    DataError where the row holds no ``raw_prompt``, or tokens of tools and users stand in the answer.
    """
    columns: Mapping[str, Any] = item.non_tensor_batch
    if (messages := columns.get("raw_prompt")) is None:
        raise DataError(
            "verl hands over no raw_prompt: its agent loop does, and return_raw_chat for verl's older data sets."
        )
    if (turns := columns.get("__num_turns__")) is not None and int(turns) > 2:
        raise DataError(
            f"an answer of {int(turns)} turns: verl does not say which of its tokens the model has said, so the attention reward "
            "judges answers of one turn (the single_turn agent loop)."
        )
    prompts, answers = item.batch["prompts"], item.batch["responses"]
    mask = item.batch["attention_mask"].bool()
    if "prompt_len" in columns:  # rows of several lengths that verl has padded on the right
        ids, said = prompts[: int(columns["prompt_len"])], answers[: int(columns["response_len"])]
    else:
        ids, said = prompts[mask[: len(prompts)]], answers[mask[len(prompts) :]]
    given = messages if isinstance(messages, str) else [dict(message) for message in messages]
    return Asked(given, tuple(ids.tolist()), tuple(said.tolist()))


def _actor(path: str | None, num_gpus: float) -> Any:
    """The Ray actor that holds the model of these settings, started by the first who asks; None where Ray does not run."""
    try:
        ray = import_module("ray")
    except ModuleNotFoundError:
        return None
    if not ray.is_initialized():
        return None
    name = f"cagsr-reward-{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    return ray.remote(RewardWorker).options(name=name, get_if_exists=True, num_gpus=num_gpus).remote(path)
