"""One PPO step: ratio 1 before the first update, micro-batches that change nothing, and a reward it can follow."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import tiny
from cagsr.config import (
    AttentionConfig,
    CoverageConfig,
    DataConfig,
    GroundedCoverageConfig,
    LoraConfig,
    ModelConfig,
    PPOConfig,
    RewardConfig,
    RunConfig,
    SalienceConfig,
    SamplingConfig,
    TrainConfig,
)
from cagsr.errors import CagsrError
from cagsr.flow import Experience
from cagsr.models.load import load_model
from cagsr.prompts.prepare import prepare_prompts
from cagsr.prompts.stream import PromptSet
from cagsr.reward.build import build_reward
from cagsr.reward.registry import Resources
from cagsr.training.ppo import PPO
from conversations import conversations

COVERAGE = RewardConfig(coverage=CoverageConfig(weight=1.0), grounded_coverage=GroundedCoverageConfig(weight=0.0))
"""For answers that say no word of their prompt."""
FAMILIES = ["llama", "qwen3", "gpt2", "gpt_neox", "gemma3", "mistral", "t5", "bart"]


def setting(folder: Path, kind: str = "llama", **changes: object) -> tuple[PPO, PromptSet]:
    if not (folder / "config.json").exists():
        tiny.save_model(folder, kind)
    data = tiny.save_prompts(folder / "prompts.jsonl")
    config = TrainConfig(
        model=ModelConfig(str(folder), device="cpu"),
        data=DataConfig(str(data)),
        output_dir=str(folder / "run"),
        sampling=SamplingConfig(num_generations=4, max_new_tokens=6),
        ppo=PPOConfig(num_ppo_epochs=2, num_mini_batches=2, learning_rate=1e-3, adam_eps=1e-5),
        run=RunConfig(steps=5),
    )
    config = dataclasses.replace(config, **changes)  # type: ignore[arg-type]
    torch.manual_seed(0)
    loaded = load_model(config.model, config.lora)
    prompts = prepare_prompts(config.data, config.salience, loaded.tokenizer, max_length=50)
    reward = build_reward(config.reward, device="cpu", resources=Resources(loaded.texts))
    return PPO(config, loaded, reward, Accelerator(cpu=True)), prompts


def step(ppo: PPO, prompts: PromptSet, seed: int = 0) -> dict[str, float]:
    torch.manual_seed(seed)
    return ppo.update(ppo.collect(prompts.prompts[:4]))


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("rank", [0, 2])
def test_every_family_takes_a_step_with_ratio_one_before_it(kind: str, rank: int, tmp_path: Path):
    ppo, prompts = setting(tmp_path, kind, lora=LoraConfig(r=rank))
    before = {name: value.clone() for name, value in ppo.loaded.model.named_parameters()}
    metrics = step(ppo, prompts)
    assert metrics["val/ratio_first_error"] < 1e-4
    assert metrics["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values())
    after = dict(ppo.loaded.model.named_parameters())
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved
    assert all(after[name].requires_grad for name in moved)
    assert step(ppo, prompts, seed=1)["objective/kl_k3"] > 1e-6


@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo"])
@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_micro_batches_change_nothing(tmp_path: Path, estimator: str, kl_in: str):
    def trained(micro: int) -> tuple[dict[str, float], torch.Tensor]:
        config = PPOConfig(
            estimator=estimator,  # type: ignore[arg-type]
            kl_in=kl_in,  # type: ignore[arg-type]
            kl_estimator="k3" if kl_in == "loss" else "k1",
            kl_coef=0.3,
            entropy_coef=0.01,
            num_ppo_epochs=2,
            num_mini_batches=2,
            micro_batch_size=micro,
            learning_rate=1e-3,
            adam_eps=1e-3,
        )
        ppo, prompts = setting(tmp_path, ppo=config)
        step(ppo, prompts)
        metrics = step(ppo, prompts, seed=1)
        return metrics, torch.cat([value.flatten() for value in ppo.loaded.model.parameters()]).detach()

    whole, weights_whole = trained(16)
    split, weights_split = trained(3)
    torch.testing.assert_close(weights_split, weights_whole, atol=2e-5, rtol=1e-4)
    for name, value in whole.items():
        assert split[name] == pytest.approx(value, abs=2e-3, rel=2e-3), name


@pytest.mark.parametrize("mini_batches", [1, 3, 6, 7, 9, 16])
def test_there_are_as_many_mini_batches_as_asked_for_of_like_size(
    mini_batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ppo, prompts = setting(tmp_path, ppo=PPOConfig(num_ppo_epochs=2, num_mini_batches=mini_batches, learning_rate=1e-9))
    taken: list[list[int]] = []
    original = ppo._gradient_step

    def watched(experience: Experience, index: torch.Tensor) -> dict[str, float]:
        taken.append(index.tolist())
        return original(experience, index)

    monkeypatch.setattr(ppo, "_gradient_step", watched)
    metrics = step(ppo, prompts)
    assert len(taken) == 2 * mini_batches
    for epoch in (taken[:mini_batches], taken[mini_batches:]):
        assert sorted(itertools.chain.from_iterable(epoch)) == list(range(16))
        sizes = [len(one) for one in epoch]
        assert max(sizes) - min(sizes) <= 1
    assert metrics["val/ratio"] == pytest.approx(1.0, abs=1e-4)  # a mean over all of them


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("rank", [0, 2])
def test_gradient_checkpointing_changes_no_step(kind: str, rank: int, tmp_path: Path):
    found = []
    for checkpointing in (False, True):
        model = ModelConfig(str(tmp_path), device="cpu", gradient_checkpointing=checkpointing)
        ppo, prompts = setting(
            tmp_path, kind, model=model, lora=LoraConfig(r=rank), ppo=PPOConfig(learning_rate=1e-3, adam_eps=1e-3)
        )
        metrics = step(ppo, prompts)
        assert metrics["val/ratio_first_error"] < 1e-4
        found.append((metrics, torch.cat([one.flatten() for one in ppo.loaded.model.parameters()]).detach()))
    torch.testing.assert_close(found[1][1], found[0][1], atol=2e-5, rtol=1e-4)
    assert found[1][0]["objective/scores"] == pytest.approx(found[0][0]["objective/scores"], abs=1e-4)


@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo"])
def test_a_reward_is_followed(tmp_path: Path, estimator: str):
    """Paying for the share of one token must make it likelier: the sign and the plumbing of the whole step."""
    (tmp_path / "pays_for_cat.py").write_text(
        "def pays(prompts, completions, completion_ids, **columns):\n"
        "    return [sum(w == 'cat' for w in text.split()) / 6 for text in completions]\n"
    )
    reward = RewardConfig(
        grounded_coverage=dataclasses.replace(RewardConfig().grounded_coverage, weight=0.0),
        repetition=dataclasses.replace(RewardConfig().repetition, weight=0.0),
        functions=["pays_for_cat.pays"],
    )
    ppo_config = PPOConfig(
        estimator=estimator,  # type: ignore[arg-type]
        kl_coef=0.0,
        learning_rate=3e-3,
        missing_eos_penalty=None,
    )
    monkey = pytest.MonkeyPatch()
    monkey.syspath_prepend(str(tmp_path))
    try:
        ppo, prompts = setting(tmp_path, reward=reward, ppo=ppo_config, run=RunConfig(steps=12))
        history = [step(ppo, prompts, seed=number)["rewards/pays/mean"] for number in range(12)]
    finally:
        monkey.undo()
    assert sum(history[-3:]) / 3 > sum(history[:3]) / 3 + 0.1, history


def test_attention_of_the_reference_does_not_move_with_the_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ppo, prompts = setting(
        tmp_path,
        attention=AttentionConfig(source="reference"),
        reward=COVERAGE,
        sampling=SamplingConfig(num_generations=2, max_new_tokens=5, temperature=1.0),
    )
    read: list[object] = []
    plain = ppo.scorer._attention
    monkeypatch.setattr(ppo.scorer, "_attention", lambda model, *rest: read.append(model) or plain(model, *rest))
    torch.manual_seed(0)
    first = ppo.collect(prompts.prompts[:2])
    with torch.no_grad():
        for parameter in ppo.loaded.model.parameters():
            parameter.mul_(1.05)
    # The same answers again, of which the moved policy thinks otherwise.
    monkeypatch.setattr(ppo.sampler, "sample", lambda batch, sampling: first.episodes)
    second = ppo.collect(prompts.prompts[:2])
    assert not torch.allclose(first.readings.logprobs, second.readings.logprobs, atol=1e-3)
    torch.testing.assert_close(first.returns.terms["coverage"], second.returns.terms["coverage"])
    assert read
    assert all(model is not ppo.loaded.model for model in read)


def test_a_wrong_ratio_before_the_first_update_stops_the_run(tmp_path: Path):
    ppo, prompts = setting(tmp_path)
    experience = ppo.collect(prompts.prompts[:4])
    shifted = dataclasses.replace(experience.readings, logprobs=experience.readings.logprobs - 0.1)
    with pytest.raises(CagsrError, match="ratio before the first update"):
        ppo.update(dataclasses.replace(experience, readings=shifted))


def test_filters_are_corrected_and_logged(tmp_path: Path):
    ppo, prompts = setting(tmp_path, sampling=SamplingConfig(num_generations=4, max_new_tokens=6, top_p=0.5))
    assert step(ppo, prompts)["sampling/correction_avg"] < -0.05


def test_salience_pooling_reaches_the_reward(tmp_path: Path):
    ppo, prompts = setting(tmp_path, salience=SalienceConfig(weighting="uniform"), reward=COVERAGE)
    experience = ppo.collect(prompts.prompts[:2])
    coverage = experience.returns.terms["coverage"]
    assert ((coverage >= 0) & (coverage <= 1)).all()
    assert coverage.std() > 0


@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo"])
@pytest.mark.parametrize("source", ["policy", "reference"])
def test_two_turns_are_trained_on_and_micro_batches_change_nothing(tmp_path: Path, estimator: str, source: str):
    """Episodes that a task made: prompt, answer, reply, answer, some of them with one answer alone."""
    lengths = [(2, 3, 2), (3,), (1, 1, 4), (2, 2, 3), (4, 2, 1), (5, 1, 1)]
    episodes = conversations([4, 7], [0, 1, 0, 1, 0, 1], lengths)

    def trained(micro: int) -> tuple[Experience, dict[str, float], torch.Tensor]:
        config = PPOConfig(
            estimator=estimator,  # type: ignore[arg-type]
            num_ppo_epochs=2,
            micro_batch_size=micro,
            learning_rate=1e-3,
            adam_eps=1e-3,
        )
        attention = AttentionConfig(source=source)  # type: ignore[arg-type]
        ppo, prompts = setting(tmp_path, ppo=config, attention=attention, reward=COVERAGE)
        ppo.sampler.sample = lambda batch, sampling: episodes  # type: ignore[method-assign]
        experience = ppo.collect(prompts.prompts[:2])
        torch.manual_seed(1)
        metrics = ppo.update(experience)
        return experience, metrics, torch.cat([one.flatten() for one in ppo.loaded.model.parameters()]).detach()

    experience, whole, weights = trained(16)
    assert experience.returns.by_turn.shape == (6, 2)
    torch.testing.assert_close(experience.returns.by_turn.sum(1), experience.returns.total)
    assert experience.returns.by_turn[1].tolist() == [float(experience.returns.total[1]), 0.0]
    assert (experience.targets.advantages[~episodes.sampled] == 0).all()
    second = experience.targets.advantages[episodes.sampled & (episodes.turn == 1)]
    assert second.abs().max() > 0.1
    assert whole["val/ratio_first_error"] < 1e-4
    assert whole["response/length"] == pytest.approx(28 / 6)
    assert all(math.isfinite(value) for value in whole.values())
    _, split, same = trained(2)
    torch.testing.assert_close(same, weights, atol=2e-5, rtol=1e-4)
    for name, value in whole.items():
        assert split[name] == pytest.approx(value, abs=2e-3, rel=2e-3), name
