"""Terms worked out while the attention is read, without keeping its maps: the same reward, a batch at a time or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

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
from cagsr.errors import RewardError
from cagsr.flow import EncodedPrompt, Experience, RewardBatch
from cagsr.models.load import load_model
from cagsr.prompts.prepare import prepare_prompts
from cagsr.reward.build import build_reward
from cagsr.reward.function import RewardFunction
from cagsr.reward.micro_batch import TermVisitor
from cagsr.reward.registry import Resources
from cagsr.reward.term import ATTENTION, PartialValues, RewardTerm
from cagsr.reward.values import RawValues
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
    reward = build_reward(config.reward, device="cpu", resources=Resources(loaded.texts))
    return PPO(config, loaded, reward, Accelerator(cpu=True)), prompts.prompts[:4]


@dataclass
class Whole:
    """A term that is asked once, about the whole batch: nothing is said of what it needs, so the maps are kept."""

    term: RewardTerm

    @property
    def name(self) -> str:
        return self.term.name

    def __call__(self, batch: RewardBatch) -> Tensor | PartialValues:
        return self.term(batch)


def collected(ppo: PPO, prompts: list[EncodedPrompt]) -> tuple[Experience, list[TermVisitor]]:
    """What a step collects, and what it kept of the attention."""
    visitors: list[TermVisitor] = []

    class Watched(TermVisitor):
        def __init__(self, *given: Any, **settings: Any) -> None:
            super().__init__(*given, **settings)
            visitors.append(self)

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cagsr.training.ppo.TermVisitor", Watched)
        return ppo.collect(prompts), visitors


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
    lean, visitors = collected(ppo, prompts)
    names = {term.name for term in ppo.reward.terms}
    batch, response = lean.episodes.ids.shape
    # What is left of the attention is one number an answer, or one a token for what is paid by token.
    assert all(visitor.attention() is None for visitor in visitors)
    kept = {name: value for name, value in visitors[0].values.items() if isinstance(value, RawValues)}
    assert {name: tuple(value.values.shape) for name, value in kept.items()} == {
        "coverage": (batch, response),
        **dict.fromkeys(("copy_coverage", "grounded_coverage", "mean_mass", "focus"), (batch,)),
    }

    # The same terms, asked about the maps of the whole batch.
    ppo.reward = RewardFunction([Whole(term) for term in ppo.reward.terms], list(ppo.reward.paid.values()), "none")
    whole, visitors = collected(ppo, prompts)
    maps = visitors[0].attention()
    assert maps is not None
    assert maps.maps.shape == (*whole.episodes.ids.shape, whole.episodes.prompts.ids.shape[1])
    assert visitors[0].values == {}
    assert torch.equal(lean.episodes.ids, whole.episodes.ids)
    assert set(lean.returns.terms) == set(whole.returns.terms) == names
    for name, values in whole.returns.terms.items():
        torch.testing.assert_close(lean.returns.terms[name], values, atol=1e-5, rtol=1e-5, msg=name)
    torch.testing.assert_close(lean.returns.per_token, whole.returns.per_token, atol=1e-5, rtol=1e-5)
    assert whole.returns.terms["coverage"].std() > 1e-4


def test_attention_that_no_term_looks_at_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    off = GroundedCoverageConfig(weight=0.0)
    reward = RewardConfig(grounded_coverage=off, self_certainty=SelfCertaintyConfig(weight=1.0))
    sampling = SamplingConfig(num_generations=4, max_new_tokens=6)
    ppo, prompts = setting(tmp_path, "llama", sampling=sampling, reward=reward)
    opened = []
    reader = ppo.scorer.reader
    read = reader.read
    monkeypatch.setattr(reader, "read", lambda *given: (opened.append(given), read(*given))[1])
    experience, visitors = collected(ppo, prompts)
    assert not opened
    assert visitors[0].attention() is None
    assert experience.returns.terms["self_certainty"].std() > 0
    ppo.reward = RewardFunction([Whole(term) for term in ppo.reward.terms], list(ppo.reward.paid.values()), "none")
    collected(ppo, prompts)
    assert opened


@dataclass
class Weighted:
    """A user's term with a tensor in it, of which a reward may have two."""

    factors: Tensor
    name: str
    needs: ClassVar[frozenset[str]] = frozenset({ATTENTION})
    by_micro_batch: ClassVar[bool] = True

    def __call__(self, batch: RewardBatch) -> Tensor:
        assert batch.attention is not None
        return batch.attention.maps.sum(dim=(1, 2)) * self.factors.sum()


def test_terms_that_can_not_be_compared(make_reward_batch: Callable[..., RewardBatch]):
    """Two of one class whose fields are tensors: nothing may ask whether they are equal."""
    batch = make_reward_batch()
    terms = [Weighted(torch.ones(2), "one"), Weighted(torch.ones(2) * 2, "two")]
    visitor = TermVisitor(batch.episodes, terms, "sum")
    assert batch.attention is not None
    visitor.visit(torch.arange(len(batch.episodes.ids)), batch.episodes, batch.readings, batch.attention.maps)
    found = visitor.values
    assert visitor.attention() is None
    assert isinstance(found["one"], RawValues)
    assert isinstance(found["two"], RawValues)
    torch.testing.assert_close(found["two"].values, found["one"].values * 2)


def test_a_term_that_fails_in_a_micro_batch_is_told_when_all_are_there(make_reward_batch: Callable[..., RewardBatch]):
    class Fails:
        name = "fails"
        needs = frozenset({ATTENTION})
        by_micro_batch = True

        def __call__(self, batch: RewardBatch) -> Tensor:
            raise ZeroDivisionError("of the user's")

    batch = make_reward_batch()
    assert batch.attention is not None
    visitor = TermVisitor(batch.episodes, [Fails()], "sum")
    visitor.visit(torch.arange(len(batch.episodes.ids)), batch.episodes, batch.readings, batch.attention.maps)
    function = RewardFunction([Fails()], [1.0], "none")
    with pytest.raises(RewardError, match="reward term 'fails' failed with ZeroDivisionError: of the user's"):
        function(replace(batch, attention=None), visitor.values)
