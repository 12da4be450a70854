"""What is looked at before the first answer: a vLLM server with the right endpoints, settings and model."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from cagsr.config import ModelConfig, RolloutConfig
from cagsr.errors import ConfigError, RolloutError
from cagsr.models.load import LoadedModel
from cagsr.models.parts import stored_config
from cagsr.support.http_json import HttpStatusError, JsonServer

PROBED_TOKENS = 200
"""Tokens, spread over the vocabulary, whose text both tokenizers must read alike."""


@dataclass(frozen=True)
class ServedModel:
    """What the server says of itself."""

    name: str
    """The name that requests must give."""
    context: int | None
    """Longest prompt and answer together, in tokens; None: not told."""


def meet(server: JsonServer, rollout: RolloutConfig, model: ModelConfig, loaded: LoadedModel) -> ServedModel:
    """Wait for the server and look whether it can sample for this policy.

    Raises RolloutError where it is not up in time, is no vLLM server, was started without a setting that is needed, or with
    another tokenizer; ConfigError where the policy's vocabulary has grown, so that the server's copy can't hold its weights.
    """
    server.wait(rollout.wait)
    listed = server.get("/v1/models")
    try:
        first = listed["data"][0]
        served = ServedModel(str(first["id"]), first.get("max_model_len"))
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise RolloutError(
            f"The server at {server.url} lists no model: --rollout.url must name a vLLM server."
        ) from error
    _check_settings(server, rollout)
    _check_tokenizer(server, served, loaded.tokenizer)
    _check_vocabulary(model, loaded)
    return served


def _check_settings(server: JsonServer, rollout: RolloutConfig) -> None:
    try:
        found = server.get("/server_info?config_format=json")
    except HttpStatusError as error:
        if error.status != 404:
            raise
        raise RolloutError(
            f"The vLLM server at {server.url} has no endpoints for new weights: start it with VLLM_SERVER_DEV_MODE=1 in "
            "its environment."
        ) from error
    settings: Any = found.get("vllm_config") if isinstance(found, dict) else None
    if not isinstance(settings, dict):
        raise RolloutError(f"The server at {server.url} doesn't tell its settings as vLLM does: is it one?")
    if rollout.weights == "nccl" and settings.get("weight_transfer_config") is None:
        raise RolloutError(
            f"The vLLM server at {server.url} has no weight-transfer engine: start it with --weight-transfer-config "
            """'{"backend": "nccl"}', or use --rollout.weights disk."""
        )
    mode = (settings.get("model_config") or {}).get("logprobs_mode", "processed_logprobs")
    if mode != "processed_logprobs":
        raise RolloutError(
            f"The vLLM server at {server.url} reports {mode}, not the probabilities that tokens were drawn with: start it "
            "with --logprobs-mode processed_logprobs."
        )


def _check_tokenizer(server: JsonServer, served: ServedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    step = max(1, len(tokenizer) // PROBED_TOKENS)
    special = set(tokenizer.all_special_ids)
    text = tokenizer.decode([number for number in range(0, len(tokenizer), step) if number not in special])
    reply = server.post("/tokenize", {"model": served.name, "prompt": text})
    theirs = reply.get("tokens") if isinstance(reply, dict) else None
    if theirs != tokenizer(text).input_ids:
        raise RolloutError(
            f"The vLLM server at {server.url} serves {served.name}, whose tokenizer reads a text otherwise than the "
            "policy's: start it with the model of --model.path."
        )


def _check_vocabulary(model: ModelConfig, loaded: LoadedModel) -> None:
    stored = stored_config(model).get_text_config()
    rows = vocabulary_size(loaded)
    if rows != stored.vocab_size:
        raise ConfigError(
            f"--model.pad_token: it made the policy's vocabulary grow from {stored.vocab_size} to {rows}, and the vLLM "
            f"server's copy of {model.path} has no room for that; save the model with its PAD token and give both that one."
        )


def vocabulary_size(loaded: LoadedModel) -> int:
    """Number of rows of the policy's embedding."""
    return int(loaded.model.get_input_embeddings().weight.shape[0])
