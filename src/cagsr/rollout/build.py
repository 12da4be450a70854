"""From settings to the sampler they ask for."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator

from cagsr.config import TrainConfig
from cagsr.errors import ConfigError
from cagsr.models.load import LoadedModel
from cagsr.rollout.sampler import Sampler, TransformersSampler
from cagsr.rollout.vllm import VLLMSampler
from cagsr.rollout.vllm_http import VLLMServer
from cagsr.rollout.vllm_weights import DiskWeights, NcclWeights, WeightChannel

WEIGHTS_FOLDER = "rollout-weights"
"""Where the weights for the server lie in the run folder, unless ``rollout.weights_dir`` says otherwise."""


def build_sampler(config: TrainConfig, loaded: LoadedModel, accelerator: Accelerator) -> Sampler:
    """Make the sampler; with vLLM, meet the server.

    Raises:
        ConfigError: the model can't be sampled from this way.
        RolloutError: the server isn't there or isn't fit.
    """
    rollout = config.rollout
    if rollout.engine == "transformers":
        return TransformersSampler(loaded)
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

    def channel(server: VLLMServer) -> WeightChannel:
        if rollout.weights == "nccl":
            return NcclWeights(server, accelerator.device, rollout.group_port, rollout.wait)
        return DiskWeights(server, loaded.model, folder)

    return VLLMSampler(loaded, config.model, rollout, accelerator, channel)
