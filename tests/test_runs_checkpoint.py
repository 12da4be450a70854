"""Checkpoints come back exactly, and a kill or a full disk never costs the previous one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import apart
from cagsr.errors import RunError
from cagsr.runs.checkpoint import (
    CheckpointState,
    checkpoint_problem,
    latest_checkpoint,
    load_checkpoint,
    load_tree,
    pack_tree,
    rng_state,
    save_checkpoint,
    save_tree,
    unpack_tree,
)
from cagsr.support import atomic
from saving import save_without_pause


def tiny_llama(seed: int = 0, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
        )
    )


def trainer(seed: int, model: nn.Module | None = None, trainable_only: bool = False) -> CheckpointState:
    """A policy and a value head in two dtypes, AdamW with two groups, a schedule."""
    policy = model or tiny_llama(seed)
    value_head = nn.Linear(16, 1, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in policy.parameters() if p.requires_grad], "lr": 1e-2},
            {"params": value_head.parameters(), "lr": 1e-3, "weight_decay": 0.1},
        ],
        eps=1e-5,
        amsgrad=True,
    )
    return CheckpointState(
        modules={"policy": policy, "value_head": value_head},
        optimizers={"policy": optimizer},
        trainable_only=trainable_only,
    )


def train(state: CheckpointState, steps: int) -> list[float]:
    """Steps on random tokens: the losses depend on weights, moments and RNG alike."""
    policy, value_head = state.modules["policy"], state.modules["value_head"]
    losses = []
    for _ in range(steps):
        ids = torch.randint(0, 32, (2, 5))
        out = policy(input_ids=ids, labels=ids, output_hidden_states=True)
        noise = random.random() + np.random.rand()
        loss = out.loss + value_head(out.hidden_states[-1].bfloat16()).float().pow(2).mean() * noise
        state.optimizers["policy"].zero_grad()
        loss.backward()
        state.optimizers["policy"].step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("lora", [False, True])
def test_resumed_losses_equal_the_uninterrupted_ones_bit_for_bit(tmp_path: Path, lora: bool) -> None:
    def build(seed: int) -> CheckpointState:
        model = tiny_llama(0 if lora else seed)  # under LoRA the frozen base is not in the checkpoint
        if lora:
            torch.manual_seed(seed)
            model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.0))
        return trainer(seed, model, trainable_only=lora)

    state = build(1)
    train(state, 3)
    path = save_checkpoint(tmp_path, 3, state, keep=2)
    expected = train(state, 4)

    other = build(2)
    train(other, 1)
    loaded = load_checkpoint(path, other)
    assert loaded.step == 3
    assert loaded.notes == ()
    assert train(other, 4) == expected
    if lora:
        assert (path / "policy.safetensors").stat().st_size < 12_000


def test_optimizer_state_round_trips_with_dtypes_and_groups(tmp_path: Path) -> None:
    state = trainer(0)
    train(state, 2)
    before = state.optimizers["policy"].state_dict()
    path = save_checkpoint(tmp_path, 2, state, keep=1)
    other = trainer(5)
    load_checkpoint(path, other)
    after = other.optimizers["policy"].state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["param_groups"][0]["betas"] == (0.9, 0.999)  # a tuple, not a list
    assert after["state"].keys() == before["state"].keys()
    dtypes = set()
    for index, entries in before["state"].items():
        for name, tensor in entries.items():
            restored = after["state"][index][name]
            assert restored.dtype == tensor.dtype
            assert torch.equal(restored, tensor), (index, name)
            dtypes.add(tensor.dtype)
    assert dtypes == {torch.float32, torch.bfloat16}
    names = set(pack_tree(before)[1])
    assert {"state.state.0.exp_avg", "state.state.0.step", "state.state.0.max_exp_avg_sq"} <= names


def test_every_rng_goes_on_where_it_was(tmp_path: Path) -> None:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    random.gauss(0, 1)  # leaves a second normal number waiting, in both
    np.random.randn(1)
    path = save_checkpoint(tmp_path, 1, CheckpointState(), keep=1)

    def draw() -> tuple[float, float, float, list[float]]:
        return random.gauss(0, 1), float(np.random.randn(1)[0]), float(np.random.rand()), torch.rand(3).tolist()

    expected = draw()
    draw()
    load_checkpoint(path, CheckpointState())
    assert draw() == expected


def test_each_process_gets_its_own_rng(tmp_path: Path) -> None:
    ranks = []
    for seed in (10, 11):
        torch.manual_seed(seed)
        ranks.append(rng_state())
    path = save_checkpoint(tmp_path, 1, CheckpointState(), keep=1, rng=ranks)
    for rank, seed in enumerate((10, 11)):
        load_checkpoint(path, CheckpointState(), rank=rank, processes=2)
        drawn = torch.rand(2)
        torch.manual_seed(seed)
        assert torch.equal(drawn, torch.rand(2))


def test_another_number_of_processes_starts_random_numbers_anew(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 7, CheckpointState(), keep=1, rng=[rng_state()] * 2)

    def drawn(rank: int, processes: int, seed: int) -> list[float]:
        loaded = load_checkpoint(path, CheckpointState(), rank, processes, seed=seed)
        assert "written with 2 process(es)" in loaded.notes[0]
        return [*torch.rand(2).tolist(), random.random(), float(np.random.rand())]

    assert drawn(0, 3, 1) == drawn(0, 3, 1)
    everywhere = [drawn(rank, 3, 1) for rank in range(3)] + [drawn(0, 3, 2), drawn(0, 1, 1)]
    assert len({tuple(one) for one in everywhere}) == 5


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    tied = tiny_llama(0, tied=True)
    untied = tiny_llama(0, tied=False)
    sizes = {}
    for name, model in (("tied", tied), ("untied", untied)):
        path = save_checkpoint(tmp_path / name, 1, CheckpointState(modules={"policy": model}), keep=1)
        sizes[name] = (path / "policy.safetensors").stat().st_size
    assert sizes["untied"] - sizes["tied"] == pytest.approx(32 * 16 * 4, abs=200)
    other = tiny_llama(9, tied=True)
    load_checkpoint(tmp_path / "tied" / "step-000001", CheckpointState(modules={"policy": other}))
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert torch.equal(other.lm_head.weight, tied.lm_head.weight)


def test_views_of_one_storage_come_back_as_they_are(tmp_path: Path) -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.arange(12.0).reshape(4, 3)
            self.top = nn.Parameter(whole[:2])
            self.turned = nn.Parameter(whole[2:].T)

    saved, fresh = Fused(), Fused()
    with torch.no_grad():
        fresh.top.zero_()
        fresh.turned.zero_()
    path = save_checkpoint(tmp_path, 1, CheckpointState(modules={"m": saved}), keep=1)
    load_checkpoint(path, CheckpointState(modules={"m": fresh}))
    assert torch.equal(fresh.top, saved.top)
    assert torch.equal(fresh.turned, saved.turned)


def test_extra_state_comes_back_as_it_was(tmp_path: Path) -> None:
    shared = torch.arange(4)
    extra: dict[str, Any] = {
        "data": {"epoch": 1, "position": 17, "order": [3, 1, 2]},
        "kl": {"coef": 0.1 + 0.2, "best": float("inf")},
        "moments": {"coverage": (torch.tensor(0.5, dtype=torch.float64), 7)},
        "by_step": {1: "one", 20: None},
        "shared": [shared, shared, shared[1:], shared[:0]],
    }
    path = save_checkpoint(tmp_path, 1, CheckpointState(extra=extra), keep=1)
    loaded = dict(load_checkpoint(path, CheckpointState()).extra)
    assert [tensor.tolist() for tensor in loaded.pop("shared")] == [[0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3], []]
    del extra["shared"]
    assert loaded == extra
    with pytest.raises(TypeError, match=r"state\.thing is a object"):
        save_checkpoint(tmp_path, 2, CheckpointState(extra={"thing": object()}), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=5), st.integers()), inner, max_size=3),
    ),
    max_leaves=10,
)


@given(TREES)
@settings(max_examples=60, deadline=None)
def test_any_tree_round_trips(tmp_path_factory: pytest.TempPathFactory, tree: object) -> None:
    path = tmp_path_factory.mktemp("tree") / "tree"
    save_tree(tree, path)
    restored = load_tree(path)
    assert restored == tree
    assert type(restored) is type(tree)


def test_names_and_marks_that_collide_stay_apart() -> None:
    tree = {"a": {"b": torch.zeros(1)}, "a.b": torch.ones(1), "t": {"__tensor__": "a", "__tuple__": 1}}
    restored = unpack_tree(*pack_tree(tree))
    assert restored["a"]["b"].item() == 0
    assert restored["a.b"].item() == 1
    assert restored["t"] == tree["t"]


def test_keep_deletes_the_oldest_intact_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, CheckpointState(extra={"step": step}), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]
    (tmp_path / "step-000003" / "extra.json").write_text("")  # broken: must not count as kept
    save_checkpoint(tmp_path, 4, CheckpointState(), keep=2)
    assert {"step-000002", "step-000004"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "manifest", "garbage"])
def test_a_damaged_checkpoint_is_skipped_with_a_note(tmp_path: Path, damage: str) -> None:
    good = save_checkpoint(tmp_path, 1, trainer(0), keep=3)
    bad = save_checkpoint(tmp_path, 2, trainer(0), keep=3)
    file = bad / "policy.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "delete":
        file.unlink()
    elif damage == "manifest":
        (bad / "manifest.json").unlink()
    else:
        (bad / "manifest.json").write_text("[1, 2")
    latest = latest_checkpoint(tmp_path)
    assert (latest.path, latest.step) == (good, 1)
    assert len(latest.notes) == 1
    assert str(bad) in latest.notes[0]


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "absent").path is None
    (tmp_path / "step-000005").mkdir()
    latest = latest_checkpoint(tmp_path)
    assert latest.path is None
    assert latest.step == 0
    assert "manifest.json is missing" in latest.notes[0]


def test_another_model_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, CheckpointState(modules={"policy": nn.Linear(2, 3)}), keep=1)
    with pytest.raises(RunError, match="size mismatch"):
        load_checkpoint(path, CheckpointState(modules={"policy": nn.Linear(4, 3)}))
    with pytest.raises(RunError, match=r"holds no critic\.safetensors"):
        load_checkpoint(path, CheckpointState(modules={"critic": nn.Linear(2, 3)}))
    with pytest.raises(RunError, match=r"lora\.r"):
        load_checkpoint(path, CheckpointState(modules={"policy": nn.Linear(2, 3)}, trainable_only=True))


def test_only_trainable_weights_but_all_of_them(tmp_path: Path) -> None:
    def build(value: float) -> nn.Sequential:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[0].requires_grad_(False)
        nn.init.constant_(model[1].weight, value)
        return model

    path = save_checkpoint(tmp_path, 1, CheckpointState(modules={"m": build(1.0)}, trainable_only=True), keep=1)
    other = build(2.0)
    load_checkpoint(path, CheckpointState(modules={"m": other}, trainable_only=True))
    assert (other[1].weight == 1).all()
    wider = build(2.0)
    wider[0].requires_grad_(True)
    with pytest.raises(RunError, match=r"first: 0\.bias"):
        load_checkpoint(path, CheckpointState(modules={"m": wider}, trainable_only=True))


def test_sigkill_at_any_moment_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    """A child saves without pause and is killed at random times; each time it goes on from what it finds."""
    generator = random.Random(0)
    reached, torn, kills = 0, 0, 0
    while kills < 20 or (kills < 200 and (reached <= 10 or torn <= 3)):  # more where the machine is busy
        kills += 1
        with apart.Process(save_without_pause, tmp_path, reached + 1) as child:
            child.wait_for("begun")
            time.sleep(generator.random() * 0.06)
            child.kill()
            assert child.wait() == -signal.SIGKILL, child.said
        torn += any(path.name.startswith(".") for path in tmp_path.iterdir())
        latest = latest_checkpoint(tmp_path)
        if latest.path is None:
            assert reached == 0, "a checkpoint was lost"
            continue
        assert latest.step >= reached
        reached = latest.step
        fresh = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))
        loaded = load_checkpoint(latest.path, CheckpointState(modules={"m": fresh}))
        assert loaded.extra == {"step": reached}
        assert all((layer.weight == reached).all() for layer in fresh)
        assert latest.notes == (), "a torn folder carried a checkpoint's name"
    assert reached > 10, "the child never got to save"
    assert torn > 3, "no kill hit the middle of a save"
    atomic.clean_leftovers(tmp_path)
    assert all(checkpoint_problem(path) is None for path in tmp_path.iterdir())


def test_a_really_full_disk_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("needs root to mount a small disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        state = CheckpointState(modules={"m": nn.Linear(200, 200)})  # 161 kB: one fits, two do not
        save_checkpoint(disk, 1, state, keep=1)
        with pytest.raises(RunError, match="step-000002 can't be written because the disk is full"):
            save_checkpoint(disk, 2, state, keep=1)
        assert [path.name for path in disk.iterdir()] == ["step-000001"]
        assert latest_checkpoint(disk).step == 1
        with pytest.raises(RunError, match="disk is full"):
            atomic.write_bytes_atomically(disk / "big", b"x" * 300_000)
        assert not (disk / "big").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
