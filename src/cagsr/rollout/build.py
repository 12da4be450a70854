"""From settings to the sampler they ask for."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlparse

from accelerate import Accelerator

from cagsr.config import RolloutConfig, TrainConfig
from cagsr.errors import ConfigError
from cagsr.models.load import LoadedModel
from cagsr.rollout.sampler import Sampler, TransformersSampler
from cagsr.rollout.vllm import VLLMSampler
from cagsr.rollout.vllm_http import VLLMServer
from cagsr.rollout.vllm_weights import DiskWeights, NcclWeights, WeightChannel

WEIGHTS_FOLDER = "rollout-weights"
"""Where the weights for the server lie in the run folder, unless ``rollout.weights_dir`` says otherwise."""


def check_rollout_config(rollout: RolloutConfig) -> None:
    """Refuse settings that can't be used, before anything is loaded.

    Raises:
        ConfigError: one sentence naming the setting and what to do.
    """
    if rollout.engine == "transformers":
        return
    address = urlparse(rollout.url)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ConfigError(f"--rollout.url {rollout.url}: give the server's address as http://HOST:PORT.")
    if rollout.timeout <= 0:
        raise ConfigError(f"--rollout.timeout {rollout.timeout}: must be greater than 0 seconds.")
    if rollout.wait < 0:
        raise ConfigError(f"--rollout.wait {rollout.wait}: must be 0 seconds or more.")
    if rollout.importance_sampling_cap < 1:
        raise ConfigError(
            f"--rollout.importance_sampling_cap {rollout.importance_sampling_cap}: must be 1 or more, the weight of a token "
            "on which engine and policy agree."
        )
    if rollout.max_logp_difference < 0:
        raise ConfigError(f"--rollout.max_logp_difference {rollout.max_logp_difference}: must be 0 (off) or more.")


def build_sampler(config: TrainConfig, loaded: LoadedModel, accelerator: Accelerator) -> Sampler:
    """Make the sampler; with vLLM, meet the server.

    Args:
        config: all settings.
        loaded: the policy.
        accelerator: which process this is.

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
