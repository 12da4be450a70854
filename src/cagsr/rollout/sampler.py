"""Who samples the answers: a small interface, the sampler that is the policy itself, and which one the settings ask for.

The other sampler is a vLLM server (``rollout/vllm.py``). Whoever samples, only token ids come back: log-probabilities,
values and the attention that the reward reads are the scoring pass's (``scoring/scorer.py``), so an engine needs no patch.
"""

from pathlib import Path
from typing import Protocol

from accelerate import Accelerator

from cagsr.config import SamplingConfig, TrainConfig
from cagsr.errors import ConfigError
from cagsr.flow import EpisodeBatch, PromptBatch
from cagsr.models.load import LoadedModel
from cagsr.rollout.sample import sample_responses
from cagsr.rollout.turn_keys import TurnKeys
from cagsr.rollout.vllm import VLLMSampler
from cagsr.rollout.vllm_weights import DiskWeights, NcclWeights, WeightChannel
from cagsr.support.http_json import JsonServer

WEIGHTS_FOLDER = "rollout-weights"
"""Where the weights for the server lie in the run folder, unless ``rollout.weights_dir`` says otherwise."""


class Sampler(Protocol):
    """Samples answers from the policy as it is now. Every process calls every method, in the same order."""

    notes: tuple[str, ...]
    """What the user should know about the sampler, one sentence each."""

    def sample(self, prompts: PromptBatch, sampling: SamplingConfig, keys: TurnKeys | None = None) -> EpisodeBatch:
        """Sample one answer for each row of this process's prompts, ``sampling.num_generations`` rows in a row of a prompt.

        ``keys``: of earlier turns, for an engine that keeps them here.

        Raises RolloutError where an engine can't be reached, or gave what can't be used.
        """

    def policy_changed(self) -> None:
        """The policy was updated: the next answers must be the new policy's."""

    def close(self) -> None:
        """Let go of connections and files; no answers are sampled after it."""


class TransformersSampler:
    """The policy itself, through transformers' ``generate`` in this process, ``batch_size`` answers at once."""

    def __init__(self, loaded: LoadedModel, batch_size: int) -> None:
        self._loaded = loaded
        self._batch_size = batch_size
        self.notes: tuple[str, ...] = ()

    def sample(self, prompts: PromptBatch, sampling: SamplingConfig, keys: TurnKeys | None = None) -> EpisodeBatch:
        """As the protocol; every process samples for itself."""
        return sample_responses(self._loaded, prompts, sampling, self._batch_size, keys)

    def policy_changed(self) -> None:
        """Nothing to do: the sampler is the policy."""

    def close(self) -> None:
        """Nothing to let go of."""


def build_sampler(config: TrainConfig, loaded: LoadedModel, accelerator: Accelerator) -> Sampler:
    """Make the sampler; with vLLM, meet the server.

    Raises ConfigError where the model can't be sampled from this way, RolloutError where the server isn't there or isn't fit.
    """
    rollout = config.rollout
    if rollout.engine == "transformers":
        return TransformersSampler(loaded, rollout.batch_size)
    if not loaded.architecture.one_sequence:
        raise ConfigError(
            f"--rollout.engine vllm: {loaded.path} is an encoder-decoder model, which vLLM doesn't serve; use transformers."
        )
    if loaded.untied:
        raise ConfigError(
            f"--rollout.engine vllm: the adapters make two matrices of one that {loaded.path} shares, and the server's copy has "
            "the one; leave the embedding and the output head out of --lora.target_modules, or use transformers."
        )
    if loaded.generation.never or loaded.generation.never_first:
        raise ConfigError(
            f"--rollout.engine vllm: the generation config of {loaded.path} forbids tokens (suppress_tokens, "
            "begin_suppress_tokens or bad_words_ids), which vLLM isn't told; take them out, or use transformers."
        )
    folder = Path(rollout.weights_dir) if rollout.weights_dir else Path(config.output_dir) / WEIGHTS_FOLDER

    def channel(server: JsonServer) -> WeightChannel:
        if rollout.weights == "nccl":
            return NcclWeights(server, accelerator.device, rollout.group_port, rollout.wait)
        return DiskWeights(server, loaded.model, folder)

    return VLLMSampler(loaded, config.model, rollout, accelerator, channel)
