"""The policy's weights on their way to a vLLM server: what is sent, and the two channels it can be sent through."""

import inspect
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cagsr.errors import ConfigError, RolloutError
from cagsr.models.load import LoadedModel
from cagsr.support.atomic import clean_leftovers, disk_errors, replace_folder
from cagsr.support.extras import require
from cagsr.support.http_json import HttpStatusError, JsonServer


@dataclass(frozen=True)
class PolicyWeight:
    """One parameter of the policy under the name that the model without adapters has for it."""

    name: str
    parameter: Tensor
    """The parameter, or the frozen base of an adapted one; sharded under FSDP2."""
    delta: Callable[[], Tensor] | None
    """What the adapter adds to it, in the same shape; None without adapter."""
    dtype: torch.dtype
    """The precision it is sent in."""

    def tensor(self) -> Tensor:
        """The whole weight, adapter merged; collective where it is sharded. The model is left untouched.

        TRL merges the adapters into the model and takes them out again, which rounds the frozen base at every step.
        """
        with torch.no_grad():
            found = self.parameter.detach()
            if self.delta is not None:
                found = found + self.delta().to(found.dtype)
            if isinstance(found, DTensor):
                found = found.full_tensor()
            return found.to(self.dtype)


def policy_weights(loaded: LoadedModel) -> list[PolicyWeight]:
    """Every weight that the policy's forward pass uses, in the model's order, LoRA merged, tied weights once; not yet computed."""
    model: Any = loaded.model
    adapted: dict[str, Callable[[], Tensor]] = {}
    base, prefix = (model.get_base_model(), model.prefix) if isinstance(model, PeftModel) else (model, None)
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            (adapter,) = module.active_adapters
            adapted[f"{name}.weight"] = partial(module.get_delta_weight, adapter)
    found = []
    for name, parameter in base.named_parameters():
        if prefix is None or prefix not in name:
            plain = name.replace(".base_layer.", ".")
            found.append(PolicyWeight(plain, parameter, adapted.get(plain), loaded.compute_dtype))
    return found


class WeightChannel(Protocol):
    """Brings weights to the server; used by the main process alone."""

    def prepare(self) -> None:
        """Do all that can fail before the processes put their shards together: the others would wait for ever.

        Raises RolloutError where the server can't be reached that way, RunError where a folder can't be written.
        """

    def send(self, weights: Sequence[PolicyWeight]) -> None:
        """Make ``weights`` the server's and drop what it cached under the old ones; RolloutError where that fails."""

    def close(self) -> None:
        """Let go of files and connections."""


class DiskWeights:
    """Weights as safetensors in a folder that the server sees too, loaded by its workers' ``reload_weights``.

    vLLM documents both parts: ``POST /collective_rpc`` (vLLM's docs/features/sleep_mode.md) and ``reload_weights`` with a
    ``weights_path`` (docs/training/layerwise.md). The trainer needs neither vllm nor a GPU. The policy ``model`` gives its
    config and transformers' way from module names to checkpoint names; ``folder`` is of this run alone, and the latest
    weights lie in a subfolder with a new name each time.
    """

    def __init__(self, server: JsonServer, model: nn.Module, folder: Path) -> None:
        self._server = server
        self._model = model.get_base_model() if isinstance(model, PeftModel) else model
        # Not resolve(): a link here may be the folder itself where the server runs.
        self._folder = folder.absolute()
        self._sent = 0

    def prepare(self) -> None:
        """As the protocol."""
        if self._sent == 0 and self._folder.is_dir():  # what an interrupted run left
            clean_leftovers(self._folder)
            self._remove_but(None)

    def send(self, weights: Sequence[PolicyWeight]) -> None:
        """As the protocol."""
        self._sent += 1
        path = self._folder / f"policy-{self._sent:06d}"
        tensors = {weight.name: weight.tensor().cpu().contiguous() for weight in weights}
        with replace_folder(path) as temporary:
            self._model.save_pretrained(temporary, state_dict=tensors)
        try:
            self._server.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(path)}})
        except HttpStatusError as error:
            raise RolloutError(
                f"The vLLM server at {self._server.url} can't load the weights in {path} (status {error.status}): it must see "
                "that folder under the same path (--rollout.weights_dir), serve the policy's own architecture and have "
                "reload_weights with weights_path; its log says more."
            ) from error
        reset_prefix_cache(self._server)
        self._remove_but(path)

    def close(self) -> None:
        """Remove the weights: the run folder has the trained model in ``final``."""
        self._remove_but(None)
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _remove_but(self, kept: Path | None) -> None:
        with disk_errors(self._folder):
            for old in self._folder.glob("policy-*"):
                if old != kept:
                    shutil.rmtree(old)


class NcclWeights:
    """Weights from the main process's GPU to the server's, through TRL's ``VLLMClient`` and vLLM's NCCL weight-transfer engine.

    Trainer and server meet at ``group_port``; the client may wait ``timeout`` seconds for the server to be up. Raises ConfigError
    without a CUDA device, without vllm beside the trainer, or with a TRL whose client speaks another protocol.
    """

    def __init__(self, server: JsonServer, device: torch.device, group_port: int, timeout: float) -> None:
        if device.type != "cuda":
            raise ConfigError(
                f"--rollout.weights nccl: weights go from GPU to GPU, and the policy is on {device.type}; use disk."
            )
        self._client = trl_client(server.url, group_port, timeout)
        self._device = device
        self._server = server
        self._joined = False

    def prepare(self) -> None:
        """As the protocol: trainer and server meet, once."""
        if not self._joined:
            with self._errors():
                self._client.init_communicator(device=self._device)
            self._joined = True

    def send(self, weights: Sequence[PolicyWeight]) -> None:
        """As the protocol."""
        metadata = [
            (weight.name, str(weight.dtype).removeprefix("torch."), list(weight.parameter.shape)) for weight in weights
        ]
        with self._errors():
            self._client.update_named_params(metadata, ((one.name, one.tensor().to(self._device)) for one in weights))
        reset_prefix_cache(self._server)

    def close(self) -> None:
        """Leave the group."""
        if self._joined:
            self._client.close_communicator()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # TRL's client raises plain Exception, requests' and NCCL's errors
            raise RolloutError(
                f"The weights can't be sent to the vLLM server at {self._server.url} over NCCL ({_line(error)}): "
                "look at its log, or use --rollout.weights disk."
            ) from error


def trl_client(url: str, group_port: int, timeout: float) -> Any:
    """TRL's client for the weights, after a look at whether this TRL has the one that is meant.

    Raises ConfigError where vllm or requests is missing here or TRL's client is an older one, RolloutError where it can't connect.
    """
    require("--rollout.weights nccl", "trl")
    from trl.generation.vllm_client import VLLMClient

    if (
        not hasattr(VLLMClient, "update_named_params")
        or "metadata" not in inspect.signature(VLLMClient.update_named_params).parameters
    ):
        raise ConfigError("--rollout.weights nccl: this TRL has an older vLLM client; install trl 1.16, or use disk.")
    try:
        return VLLMClient(base_url=url, group_port=group_port, connection_timeout=timeout)
    except ImportError as error:
        raise ConfigError(
            f"--rollout.weights nccl: {_line(error)} beside the trainer too, or use --rollout.weights disk."
        ) from error
    except Exception as error:  # as in send
        raise RolloutError(f"TRL's client can't connect to the vLLM server at {url} ({_line(error)}).") from error


def reset_prefix_cache(server: JsonServer) -> None:
    """Drop keys and values computed under the old weights; RolloutError where the server doesn't, or says that it could not."""
    reply = server.post("/reset_prefix_cache", {})
    if isinstance(reply, dict) and reply.get("success") is False:
        raise RolloutError(
            f"The vLLM server at {server.url} can't drop its prefix cache, so it would answer with old weights: does "
            "someone else use it at the same time?"
        )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
