"""Terms worked out while the attention is read, without keeping its maps: the same reward, a batch at a time or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import tiny
from cagsr.config import (
    AttentionConfig,
    CopyCoverageConfig,
    CoverageConfig,
    DataConfig,
    FocusConfig,
    GroundedCoverageConfig,
    MeanMassConfig,
    ModelConfig,
    PPOConfig,
    RepetitionConfig,
    RewardConfig,
    SalienceConfig,
    SamplingConfig,
    SelfCertaintyConfig,
    TrainConfig,
)
from cagsr.flow import EncodedPrompt, Experience
from cagsr.models.load import load_model
from cagsr.prompts.prepare import prepare_prompts
from cagsr.reward.build import build_reward
from cagsr.training.ppo import PPO

EVERYTHING = RewardConfig(
    coverage=CoverageConfig(weight=1.0, dense=True),
    copy_coverage=CopyCoverageConfig(weight=0.5),
    grounded_coverage=GroundedCoverageConfig(weight=1.0, threshold=0.3),
    mean_mass=MeanMassConfig(weight=0.25),
    focus=FocusConfig(weight=-0.5, entropy_floor=0.1),
    repetition=RepetitionConfig(weight=-1.0, n=2),
    self_certainty=SelfCertaintyConfig(weight=0.7),
    normalize="none",
)


def setting(folder: Path, kind: str, **settings: object) -> tuple[PPO, list[EncodedPrompt]]:
    if not (folder / "config.json").exists():
        tiny.save_model(folder, kind)
    data = tiny.save_prompts(folder / "prompts.jsonl")
    config = TrainConfig(
        ModelConfig(str(folder), device="cpu"),
        DataConfig(str(data)),
        str(folder / "run"),
        **settings,  # type: ignore[arg-type]
    )
    loaded = load_model(config.model)
    prompts = prepare_prompts(config.data, config.salience, loaded.tokenizer, max_length=50)
    reward = build_reward(config.reward, device="cpu", texts=loaded.texts)
    return PPO(config, loaded, reward, Accelerator(cpu=True)), prompts.prompts[:4]


def collected(ppo: PPO, prompts: list[EncodedPrompt]) -> Experience:
    torch.manual_seed(0)
    return ppo.collect(prompts)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("source", ["policy", "reference"])
@pytest.mark.parametrize("pooling", ["sum", "max"])
def test_the_reward_is_that_of_the_maps(kind: str, source: str, pooling: str, tmp_path: Path):
    ppo, prompts = setting(
        tmp_path,
        kind,
        attention=AttentionConfig(source=source),  # type: ignore[arg-type]
        salience=SalienceConfig(pooling=pooling),  # type: ignore[arg-type]
        sampling=SamplingConfig(num_generations=4, max_new_tokens=6, temperature=1.3),
        ppo=PPOConfig(micro_batch_size=3),
        reward=EVERYTHING,
    )
    lean = collected(ppo, prompts)
    ppo.attention_terms = None
    whole = collected(ppo, prompts)
    assert torch.equal(lean.rollout.ids, whole.rollout.ids)
    assert set(lean.reward.terms) == set(whole.reward.terms) == {term.name for term in ppo.reward.terms}
    for name, values in whole.reward.terms.items():
        torch.testing.assert_close(lean.reward.terms[name], values, atol=1e-5, rtol=1e-5, msg=name)
    torch.testing.assert_close(lean.reward.per_token, whole.reward.per_token, atol=1e-5, rtol=1e-5)
    assert whole.reward.terms["coverage"].std() > 1e-4
    if source == "policy":
        assert lean.scores.attention is not None
        assert whole.scores.attention is not None
        assert whole.scores.attention.maps is not None
        assert whole.scores.attention.maps.shape[2] == whole.rollout.prompts.ids.shape[1]
        # What is left of the attention is one number an answer, or one a token for what is paid by token.
        assert lean.scores.attention.maps is None
        batch, response = lean.rollout.ids.shape
        assert {name: tuple(value.shape) for name, value in lean.scores.attention.values.items()} == {
            "coverage": (batch, response),
            **dict.fromkeys(("copy_coverage", "grounded_coverage", "mean_mass", "focus"), (batch,)),
        }


def test_attention_that_no_term_looks_at_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    off = CoverageConfig(weight=0.0)
    reward = RewardConfig(coverage=off, self_certainty=SelfCertaintyConfig(weight=1.0))
    sampling = SamplingConfig(num_generations=4, max_new_tokens=6)
    ppo, prompts = setting(tmp_path, "llama", sampling=sampling, reward=reward)
    opened = []
    read = ppo.reader.read
    monkeypatch.setattr(ppo.reader, "read", lambda *given: (opened.append(given), read(*given))[1])
    experience = collected(ppo, prompts)
    assert not opened
    assert experience.readings.attention is None
    assert experience.returns.terms["self_certainty"].std() > 0
    ppo.attention_terms = None
    collected(ppo, prompts)
    assert opened
