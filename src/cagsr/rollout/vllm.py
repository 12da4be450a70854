"""Answers from a vLLM server: the main process talks to it, every process gets its share.

The server has its own copy of the weights. It gets the policy's before the first answers and before the first answers
after every update.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch.nn.utils.rnn import pad_sequence

from cagsr.config import ModelConfig, RolloutConfig, SamplingConfig
from cagsr.flow import EpisodeBatch, PromptBatch
from cagsr.models.load import LoadedModel
from cagsr.rollout.sample import cut_responses
from cagsr.rollout.turn_keys import TurnKeys
from cagsr.rollout.vllm_handshake import ServedModel, meet, vocabulary_size
from cagsr.rollout.vllm_protocol import EngineAnswer, Question, check_room, completion_request, engine_answers
from cagsr.rollout.vllm_weights import WeightChannel, policy_weights
from cagsr.support.http_json import JsonServer
from cagsr.support.processes import broadcast, gather_objects
from cagsr.support.progress import working


class VLLMSampler:
    """A ``Sampler`` whose answers come from a vLLM server; ``channel`` makes the way of the weights in the main process.

    Raises RolloutError where the server isn't there or isn't fit, ConfigError where the policy or the channel can't be used with
    it, in every process.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        model: ModelConfig,
        rollout: RolloutConfig,
        accelerator: Accelerator,
        channel: Callable[[JsonServer], WeightChannel],
    ) -> None:
        self._loaded = loaded
        self._accelerator = accelerator
        self._server = JsonServer(rollout.url, rollout.timeout)
        self._channel: WeightChannel | None = None
        self._stale = True

        def connect() -> ServedModel:
            served = meet(self._server, rollout, model, loaded)
            self._channel = channel(self._server)
            return served

        self._served = broadcast(connect, accelerator)
        self.notes: tuple[str, ...] = (
            f"Rollouts: vLLM at {self._server.url}, weights by {rollout.weights}; its context is "
            f"{self._served.context or 'an untold number of'} tokens.",
        )

    def sample(self, prompts: PromptBatch, sampling: SamplingConfig, keys: TurnKeys | None = None) -> EpisodeBatch:
        """As the protocol: all processes' prompts go to the server in one request, which caches what it has read itself."""
        if self._stale:
            self._send_weights()
            self._stale = False
        own, rank = questions_of(prompts, sampling.num_generations), self._accelerator.process_index
        everyone = gather_objects([own], self._accelerator)
        asked = [question for questions in everyone for question in questions]
        with working("sampling by vLLM"):
            answers = broadcast(lambda: self._ask(asked, sampling), self._accelerator)
        first = sum(len(questions) for questions in everyone[:rank]) * sampling.num_generations
        return assemble(answers[first : first + len(prompts.group)], prompts, self._loaded, sampling)

    def policy_changed(self) -> None:
        """As the protocol: the weights are sent before the next answers."""
        self._stale = True

    def close(self) -> None:
        """As the protocol."""
        if self._channel is not None:
            self._channel.close()

    def _ask(self, questions: Sequence[Question], sampling: SamplingConfig) -> list[EngineAnswer]:
        stop_ids, stop_strings = self._loaded.stops(sampling)
        sampling = replace(sampling, stop_strings=list(stop_strings))
        check_room(questions, sampling, self._served.context, self._server.url)
        reply = self._server.post(
            "/v1/completions", completion_request(self._served.name, questions, sampling, stop_ids)
        )
        return engine_answers(reply, questions, sampling, stop_ids, vocabulary_size(self._loaded))

    @working("sending the weights to vLLM")
    def _send_weights(self) -> None:
        weights = policy_weights(self._loaded)
        broadcast(lambda: self._channel.prepare() if self._channel is not None else None, self._accelerator)
        if not self._accelerator.is_main_process:
            for weight in weights:
                weight.tensor()  # a sharded weight is put together by all processes
        broadcast(lambda: self._channel.send(weights) if self._channel is not None else None, self._accelerator)


def questions_of(prompts: PromptBatch, generations: int) -> list[Question]:
    """The prompts without padding and without their repetitions, each standing there ``generations`` times in a row."""
    ids, mask, group = prompts.ids.cpu(), prompts.real.cpu(), prompts.group.cpu()
    if len(group) % generations or not torch.equal(group, group[::generations].repeat_interleave(generations)):
        raise ValueError(f"each prompt must stand there {generations} times in a row")
    return [
        Question(prompts.prompts[row].row, tuple(ids[row, mask[row]].tolist()))
        for row in range(0, len(group), generations)
    ]


def assemble(
    answers: Sequence[EngineAnswer], prompts: PromptBatch, loaded: LoadedModel, sampling: SamplingConfig
) -> EpisodeBatch:
    """Pad an engine's answers into a rollout, cut as the built-in sampler's are; ``sampler_logprobs`` is 0 on padding."""
    device = prompts.ids.device
    lengths = torch.tensor([len(answer.ids) for answer in answers])
    ids = pad_sequence(
        [torch.tensor(answer.ids) for answer in answers], batch_first=True, padding_value=loaded.pad_token_id
    )
    logprobs = pad_sequence([torch.tensor(answer.logprobs) for answer in answers], batch_first=True)
    cut = cut_responses(ids.to(device), prompts, loaded, *loaded.stops(sampling))
    # An answer may be over before its stop shows in our text (the engine's own idea of a stop string), and what comes
    # after it is filling, not tokens.
    width = cut.ids.shape[1]
    mask = cut.real & (torch.arange(width)[None, :] < lengths[:, None]).to(device)
    ended = cut.ended | torch.tensor([answer.ended for answer in answers], device=device)
    return replace(
        cut,
        ids=cut.ids.masked_fill(~mask, loaded.pad_token_id),
        real=mask,
        sampled=mask,
        ended=ended,
        sampler_logprobs=logprobs[:, :width].to(device).masked_fill(~mask, 0.0),
    )
