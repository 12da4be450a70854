"""The weights on their way: merged LoRA, checkpoint names, shards put together, and TRL's client over NCCL (its calls)."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from trl.generation.vllm_client import VLLMClient

import apart
import tiny
from cagsr.config import LoraConfig, ModelConfig
from cagsr.errors import ConfigError, RolloutError
from cagsr.models.load import LoadedModel, load_model
from cagsr.rollout import vllm_weights
from cagsr.rollout.vllm_weights import DiskWeights, NcclWeights, PolicyWeight, policy_weights
from cagsr.support.http_json import JsonServer
from vllm_server import serving


def adapted(folder: Path, rank: int, dtype: str = "float32") -> LoadedModel:
    """The policy, its adapters as if trained."""
    torch.manual_seed(1)  # the same adapters at every call
    loaded = load_model(ModelConfig(str(folder), device="cpu", dtype=dtype), LoraConfig(r=rank))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return loaded


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # gpt2's weights lie the other way round
def test_lora_is_merged_and_the_model_left_alone(kind: str, tmp_path: Path):
    loaded = adapted(tiny.save_model(tmp_path / "model", kind), 2)
    before = {name: value.clone() for name, value in loaded.model.named_parameters()}
    sent = {weight.name: weight.tensor() for weight in policy_weights(loaded)}
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.named_parameters())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert sent.keys() == {name for name, _ in plain.named_parameters()}
    assert isinstance(loaded.model, PeftModel)
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        wanted = loaded.model(ids).logits
        assert not torch.allclose(plain(ids).logits, wanted, atol=1e-3)
        plain.load_state_dict(sent, strict=False)
        torch.testing.assert_close(plain(ids).logits, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_bfloat16_policy_is_sent_in_bfloat16(rank: int, tmp_path: Path):
    loaded = adapted(tiny.save_model(tmp_path / "model"), rank, "bfloat16")
    assert {weight.tensor().dtype for weight in policy_weights(loaded)} == {torch.bfloat16}


def test_on_the_disk_they_are_a_checkpoint_that_transformers_loads(tmp_path: Path):
    """What vLLM's loader reads: checkpoint names, a config, safetensors and nothing else."""
    loaded = adapted(tiny.save_model(tmp_path / "model"), 2)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "weights").symlink_to(tmp_path / "elsewhere")  # where the server runs it may be the folder itself
    with serving(tmp_path / "model") as engine:
        DiskWeights(JsonServer(engine.url, 10), loaded.model, tmp_path / "weights").send(policy_weights(loaded))
        (sent,) = [body for path, body in engine.asked if path == "/collective_rpc"]
    (folder,) = (tmp_path / "elsewhere").iterdir()
    assert [path.name for path in folder.iterdir() if path.suffix != ".json"] == ["model.safetensors"]
    assert load_file(folder / "model.safetensors").keys() == load_file(tmp_path / "model" / "model.safetensors").keys()
    reread = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    assert all(torch.equal(reread[weight.name], weight.tensor()) for weight in policy_weights(loaded))
    assert sent == {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path / "weights" / folder.name)}}
    assert folder.is_absolute()


def test_nccl_speaks_to_trls_client_as_it_wants_to_be_spoken_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No GPU here: the class is TRL's own with its signatures, its insides are not."""
    client = create_autospec(VLLMClient, instance=True)
    sent: list[tuple[str, Tensor]] = []
    client.update_named_params.side_effect = lambda metadata, weights: sent.extend(weights)
    monkeypatch.setattr(vllm_weights, "trl_client", lambda url, port, timeout: client)
    loaded = adapted(tiny.save_model(tmp_path / "model"), 2)
    with serving(tmp_path / "model") as engine:
        channel = NcclWeights(JsonServer(engine.url, 10), torch.device("cuda:0"), 51216, 1.0)
        channel.prepare()
        monkeypatch.setattr(channel, "_device", torch.device("cpu"))
        for _ in range(2):
            channel.prepare()
            channel.send(policy_weights(loaded))
        assert [path for path, _ in engine.asked] == ["/reset_prefix_cache"] * 2
    client.init_communicator.assert_called_once_with(device=torch.device("cuda:0"))
    metadata = client.update_named_params.call_args.args[0]
    assert len(sent) == 2 * len(metadata)
    # The server makes room by what was announced: names, types and shapes must be the tensors', in the same order.
    announced = [(name, dtype, shape) for name, dtype, shape in metadata]
    assert announced == [(name, str(value.dtype)[6:], list(value.shape)) for name, value in sent[: len(metadata)]]
    client.update_named_params.side_effect = Exception("Request failed: 500, no\nroom")
    with pytest.raises(RolloutError, match=r"over NCCL \(Request failed: 500, no room\)"):
        channel.send(policy_weights(loaded))


def test_nccl_without_vllm_or_without_a_gpu_is_refused():
    server = JsonServer("http://127.0.0.1:9", 1)
    with pytest.raises(ConfigError, match="the policy is on cpu"):
        NcclWeights(server, torch.device("cpu"), 51216, 0.0)
    with pytest.raises(ConfigError, match=r"--rollout.weights nccl: .* is not installed.*use --rollout.weights disk"):
        NcclWeights(server, torch.device("cuda"), 51216, 0.0)


def test_shards_of_two_processes_are_sent_whole(tmp_path: Path):
    apart.together(2, shards_are_sent_whole, tiny.save_model(tmp_path / "model"))


def shards_are_sent_whole(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    for rank in (0, 2):
        sharded_equals_whole(folder, rank)
    torch.distributed.barrier()  # as in test_train_processes.py
    torch.distributed.destroy_process_group()


def sharded_equals_whole(folder: Path, rank: int) -> None:
    """Run by each process: FSDP2 leaves a part of every parameter here, and what is sent is whole."""
    whole = {weight.name: weight.tensor() for weight in policy_weights(adapted(folder, rank))}
    loaded = adapted(folder, rank)
    base = loaded.model.get_base_model() if rank else loaded.model
    assert isinstance(base, nn.Module)
    for layer in base.model.layers:
        fully_shard(layer)
    fully_shard(loaded.model)
    weights: list[PolicyWeight] = policy_weights(loaded)
    assert all(weight.parameter.to_local().numel() < weight.parameter.numel() for weight in weights)  # type: ignore[attr-defined]
    for weight in weights:
        torch.testing.assert_close(weight.tensor(), whole[weight.name], atol=1e-6, rtol=1e-6)
        assert list(weight.tensor().shape) == list(weight.parameter.shape)
