"""The losses that an update sums, against numbers worked out by hand; their weights, and objectives of one's own."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cagsr.advantage.kl import KLController
from cagsr.config import PPOConfig
from cagsr.errors import ConfigError
from cagsr.flow import EpisodeBatch, Experience, Prompt, PromptBatch, Readings, Targets
from cagsr.objectives.build import build_objectives
from cagsr.objectives.objective import Objective, UpdateBatch
from cagsr.objectives.policy import PolicyObjective, policy_loss
from cagsr.objectives.token_means import CrossEntropyObjective, EntropyObjective, KLObjective
from cagsr.objectives.value import ValueObjective, explained_variance, value_loss
from cagsr.training.ppo import PPO
from test_train_processes import rows_of
from test_training_ppo import setting

MASK = torch.tensor([[True, True, False]])


def test_policy_loss_takes_the_worse_of_plain_and_clipped():
    old = torch.zeros(1, 3)
    new = torch.tensor([[math.log(1.5), math.log(0.5), math.log(9.0)]])
    advantages = torch.tensor([[1.0, -1.0, 100.0]])
    # token 1: max(-1.5, -1.2) = -1.2 (clipped); token 2: max(0.5, 0.8) = 0.8 (clipped); token 3 is padding
    found = policy_loss(new, old, advantages, MASK, torch.tensor(2.0), 0.2)
    assert float(found.loss) == pytest.approx((-1.2 + 0.8) / 2)
    assert int(found.clipped) == 2
    expected_kl = (1.5 - 1 - math.log(1.5)) + (0.5 - 1 - math.log(0.5))
    assert float(found.approx_kl) == pytest.approx(expected_kl, abs=1e-6)


def test_policy_loss_unclipped_side_has_the_plain_gradient():
    new = torch.tensor([[math.log(0.5), 0.0, 0.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, 0.0, 0.0]])
    # a good token that became less likely must still be pushed up: max(-0.5, -0.8) = -0.5, gradient -0.5
    policy_loss(new, torch.zeros(1, 3), advantages, MASK, torch.tensor(1.0), 0.2).loss.backward()
    assert new.grad is not None
    assert new.grad[0].tolist() == pytest.approx([-0.5, 0.0, 0.0])


def test_policy_loss_weighs_tokens_by_the_sampling_correction():
    advantages = torch.tensor([[1.0, 3.0, 0.0]])
    correction = torch.tensor([[math.log(0.5), 0.0, 0.0]])
    found = policy_loss(torch.zeros(1, 3), torch.zeros(1, 3), advantages, MASK, torch.tensor(2.0), 0.2, correction)
    assert float(found.loss) == pytest.approx(-(0.5 * 1 + 3) / 2)


def test_log_ratio_is_clamped_before_exp():
    new = torch.tensor([[1e4, 0.0, 0.0]])
    found = policy_loss(new, torch.zeros(1, 3), torch.ones(1, 3), MASK, torch.tensor(2.0), 0.2)
    assert torch.isfinite(found.loss)
    assert torch.isfinite(found.ratio).all()


def test_value_loss_is_half_the_larger_squared_error():
    values, old = torch.tensor([[1.0, 0.1, 5.0]]), torch.zeros(1, 3)
    returns = torch.tensor([[1.0, 1.0, 0.0]])
    # token 1: clipped to 0.2: max(0, 0.64); token 2: inside the range: 0.81
    assert float(value_loss(values, old, returns, MASK, torch.tensor(2.0), 0.2)) == pytest.approx((0.64 + 0.81) / 4)


def test_explained_variance():
    returns = torch.tensor([[1.0, 3.0, 9.0]])
    assert explained_variance(returns, returns, MASK) == pytest.approx(1.0)
    assert explained_variance(torch.zeros(1, 3), returns, MASK) == pytest.approx(0.0)
    assert explained_variance(torch.tensor([[3.0, 1.0, 0.0]]), returns, MASK) == pytest.approx(-3.0)


def made(
    rl: list[float],
    ce: list[float] | None = None,
    total: float | None = None,
    logprobs: list[float] | None = None,
    advantages: list[float] | None = None,
) -> UpdateBatch:
    """One answer of three tokens, whose policy before the update gave each probability 1."""
    zeros, mask = torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)
    one = torch.ones(1, 1, dtype=torch.long)
    prompts = PromptBatch((Prompt(1, "a"),), one, one.bool(), one - 2, torch.ones(1, 1), one[0] - 1)
    weights = {"rl": torch.tensor([rl]), "ce": torch.tensor([ce or [0.0] * 3])}
    totals = {kind: weight.sum() for kind, weight in weights.items()}
    if total is not None:
        totals["rl"] = torch.tensor(total)
    return UpdateBatch(
        episodes=EpisodeBatch.of_one_turn(prompts, torch.zeros(1, 3, dtype=torch.long), mask, mask[:, 0], ("",)),
        logprobs=torch.tensor([logprobs or [0.0] * 3], requires_grad=True),
        entropy=torch.tensor([[1.0, 2.0, 4.0]]),
        values=torch.tensor([[0.1, 0.1, 0.1]]),
        readings=Readings(zeros, zeros, zeros, zeros, zeros),
        reference_logprobs=torch.full((1, 3), -1.0),
        targets=Targets(torch.tensor([advantages or [1.0, 1.0, 1.0]]), torch.ones(1, 3), weights),
        totals=totals,
    )


def test_a_mean_by_hand():
    per_token = torch.tensor([[1.0, 2.0, 5.0]])
    assert float(made([1.0, 1.0, 0.0]).mean(per_token, "rl")) == pytest.approx(1.5)
    # Weighted: (0.5 x 1 + 2 x 2 + 0.25 x 5) / 2.75.
    assert float(made([0.5, 2.0, 0.25]).mean(per_token, "rl")) == pytest.approx(5.75 / 2.75)
    # Of a mini-batch with eight positions this is one micro-batch.
    assert float(made([1.0, 1.0, 1.0], total=8.0).mean(per_token, "rl")) == pytest.approx(1.0)
    assert float(made([1.0, 0.0, 0.0], ce=[0.0, 0.0, 0.5]).mean(per_token, "ce")) == pytest.approx(5.0)


def test_a_mean_ignores_what_has_no_weight_even_where_it_is_not_finite():
    per_token = torch.tensor([[1.0, 2.0, float("nan")]])
    assert float(made([1.0, 1.0, 0.0], total=4.0).mean(per_token, "rl")) == pytest.approx(0.75)
    assert float(made([0.0, 0.0, 0.0]).mean(per_token, "rl")) == 0.0


OBJECTIVES: list[Objective] = [
    PolicyObjective(0.2),
    ValueObjective(0.1, 0.2),
    KLObjective(KLController(0.5), "k3"),
    EntropyObjective(-0.01),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda one: one.name)
def test_a_weight_scales_what_a_token_counts(objective: Objective):
    """With the sum of all weights held fixed, a token of weight 0.25 counts a quarter, one of weight 0 nothing."""

    def loss(*rl: float) -> float:
        batch = made(list(rl), total=3.0, logprobs=[math.log(1.5), math.log(0.5), 0.1], advantages=[1.0, -1.0, 2.0])
        return float(objective(batch).loss.detach())

    first, second, third = loss(1.0, 0.0, 0.0), loss(0.0, 1.0, 0.0), loss(0.0, 0.0, 1.0)
    assert min(abs(first), abs(second), abs(third)) > 1e-3
    assert loss(1.0, 0.25, 0.5) == pytest.approx(first + 0.25 * second + 0.5 * third, abs=1e-6)


def test_fractional_weights_by_hand():
    weights = [1.0, 0.5, 0.0]
    batch = made(
        weights, ce=[0.0, 0.5, 1.5], logprobs=[math.log(1.5), math.log(0.5), -2.0], advantages=[1.0, -1.0, 9.0]
    )
    found = PolicyObjective(0.2)(batch)
    assert float(found.loss) == pytest.approx((-1.2 + 0.5 * 0.8) / 1.5)
    assert float(found.metrics["ratio"]) == pytest.approx((1.5 + 0.5 * 0.5) / 1.5)
    assert float(found.metrics["clipped"]) == pytest.approx(1.0)  # a share: every token that counts was clipped
    kl = (0.5 - math.log(1.5)) + 0.5 * (-0.5 - math.log(0.5))
    assert float(found.metrics["approx_kl"]) == pytest.approx(kl / 1.5, abs=1e-6)
    assert float(ValueObjective(1.0, 0.2)(batch).loss) == pytest.approx(0.5 * 0.9**2)
    assert float(EntropyObjective(1.0)(batch).loss) == pytest.approx((1.0 + 0.5 * 2.0) / 1.5)
    k1 = KLObjective(KLController(0.5), "k1")
    assert float(k1(batch).loss) == pytest.approx((math.log(1.5) + 1 + 0.5 * (math.log(0.5) + 1)) / 1.5)
    assert k1.coefficient == 0.5
    assert float(CrossEntropyObjective(1.0)(batch).loss) == pytest.approx((0.5 * math.log(2) + 1.5 * 2.0) / 2.0)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda one: one.name)
def test_a_mini_batch_without_a_position_of_its_kind_gives_no_loss(objective: Objective):
    found = objective(made([0.0, 0.0, 0.0], ce=[1.0, 1.0, 1.0]))
    assert float(found.loss) == 0.0
    assert all(float(value) == 0.0 for value in found.metrics.values())


# ---- the list of them ----


def names(**settings: object) -> list[str]:
    config = PPOConfig(**settings)  # type: ignore[arg-type]
    return [objective.name for objective in build_objectives(config, KLController.build(config))]


def test_the_settings_say_which_objectives_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert names() == ["policy", "value"]
    assert names(estimator="rloo") == ["policy"]
    assert names(kl_in="loss", kl_estimator="k3", kl_coef=0.0) == ["policy", "value"]
    assert names(kl_in="loss", kl_estimator="k3", entropy_coef=0.1, ce_coef=0.2) == [
        "policy", "value", "kl", "entropy", "ce"
    ]  # fmt: skip
    config = PPOConfig(entropy_coef=0.1, ce_coef=0.2, vf_coef=0.3)
    found = {one.name: one.coefficient for one in build_objectives(config, KLController.build(config))}
    assert found == {"policy": 1.0, "value": 0.3, "entropy": -0.1, "ce": 0.2}


OWN = """
import torch
from dataclasses import dataclass
from cagsr.objectives.objective import ObjectiveLoss

class Floor:
    name = "floor"
    coefficient = 0.5
    def __call__(self, batch):
        return ObjectiveLoss(batch.mean((-3.0 - batch.logprobs).clamp(min=0.0), "rl"), {"seen": batch.logprobs.sum() * 0 + 2})

floor = Floor()

class Quiet(Floor):
    name = "quiet"
    logged = False

class Spread(Floor):
    name = "spread"
    needs_entropy = True
    def __call__(self, batch):
        return ObjectiveLoss(batch.mean(batch.entropy, "rl"))

class Second(Floor):
    name = "policy"

class Nameless:
    coefficient = 1.0
    def __call__(self, batch): ...

class Free:
    name = "free"
    def __call__(self, batch): ...

@dataclass
class Asks:
    floor: float
    name = "asks"
    coefficient = 1.0
    def __call__(self, batch): ...

text = "no objective"
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_objectives.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("floor", "ppo.objectives: 'floor' is not a dotted path"),
        ("own_objectives.none", "ppo.objectives: module 'own_objectives' .* has no 'none'"),
        ("own_objectivez.Floor", "ppo.objectives: .* names no module 'own_objectivez'"),
        ("own_objectives.text", "own_objectives.text: an objective is called with an UpdateBatch and has a name"),
        ("own_objectives.Nameless", "own_objectives.Nameless: an objective is called .* has a name"),
        ("own_objectives.Free", "own_objectives.Free: an objective has a coefficient, a number"),
        ("own_objectives.Asks", "own_objectives.Asks: the class can't be made without arguments"),
        ("own_objectives.Second", "two objectives are called 'policy'"),
    ],
)
@pytest.mark.usefixtures("own")
def test_what_is_no_objective_is_refused_in_one_sentence(path: str, says: str):
    with pytest.raises(ConfigError, match=says) as refusal:
        names(objectives=[path])
    assert "\n" not in str(refusal.value)


# ---- in an update ----


def collected(folder: Path, **settings: object) -> tuple[PPO, Experience]:
    defaults = PPOConfig(num_ppo_epochs=1, num_mini_batches=1, learning_rate=1e-3, kl_coef=0.0)
    ppo, prompts = setting(folder, ppo=dataclasses.replace(defaults, **settings))  # type: ignore[arg-type]
    torch.manual_seed(0)
    return ppo, ppo.collect(prompts.prompts[:4])


def weighted(experience: Experience, **weights: Tensor) -> Experience:
    targets = dataclasses.replace(experience.targets, weights=dict(experience.targets.weights) | weights)
    return dataclasses.replace(experience, targets=targets)


def step_of(ppo: PPO, experience: Experience, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, float], Tensor]:
    """An update's metrics, and the gradient that its one optimizer step was made of."""
    seen: list[Tensor] = []
    clip = ppo.accelerator.clip_grad_norm_

    def watched(parameters: object, norm: float) -> Tensor:
        grads = [one.grad for one in ppo.module.parameters()]
        seen.append(torch.cat([one.flatten() for one in grads if one is not None]).clone())
        return clip(parameters, norm)

    monkeypatch.setattr(ppo.accelerator, "clip_grad_norm_", watched)
    return ppo.update(experience), seen[0]


@pytest.mark.usefixtures("own")
def test_an_objective_of_ones_own_is_summed_and_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ppo, experience = collected(tmp_path)
    plain, gradient = step_of(ppo, experience, monkeypatch)
    assert not [name for name in plain if "floor" in name]
    assert {name for name in plain if name.startswith("loss/")} == {"loss/policy_avg", "loss/value_avg"}
    for path in ("own_objectives.Floor", "own_objectives.floor"):
        ppo, experience = collected(tmp_path, objectives=[path], micro_batch_size=3)
        metrics, with_floor = step_of(ppo, experience, monkeypatch)
        mask = experience.episodes.sampled
        floor = (-3.0 - experience.readings.logprobs[mask]).clamp(min=0.0).mean()
        assert floor > 0.1
        assert metrics["loss/floor_avg"] == pytest.approx(float(floor), abs=1e-5)
        assert metrics["loss/policy_avg"] == pytest.approx(plain["loss/policy_avg"], abs=1e-5)
        assert metrics["loss/floor/seen"] == 2 * -(-len(mask) // 3)  # its own metric, summed over micro-batches
        assert (with_floor - gradient).abs().max() > 1e-3


@pytest.mark.usefixtures("own")
def test_what_is_not_logged_and_what_needs_the_entropy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ppo, experience = collected(tmp_path, objectives=["own_objectives.Quiet", "own_objectives.Spread"])
    metrics, _ = step_of(ppo, experience, monkeypatch)
    assert "loss/quiet_avg" not in metrics
    mean = experience.readings.entropy[experience.episodes.sampled].mean()
    assert metrics["loss/spread_avg"] == pytest.approx(float(mean), abs=1e-5)


@pytest.mark.parametrize("micro_batch_size", [3, 64])
def test_marked_positions_are_imitated_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch_size: int
):
    """Without a reinforced position the gradient is that of these positions' log-probabilities, by hand."""
    ppo, experience = collected(tmp_path, ce_coef=0.3, entropy_coef=0.1, micro_batch_size=micro_batch_size)
    marked = torch.zeros_like(experience.targets.advantages)
    marked[0, 0], marked[0, 1], marked[9, 0] = 1.0, 0.5, 2.0
    assert bool(experience.episodes.sampled[marked > 0].all())
    experience = weighted(experience, ce=marked, rl=torch.zeros_like(marked))
    prompts, ids = experience.episodes.prompts, experience.episodes.ids
    logprobs = []
    for row, column in marked.nonzero().tolist():
        before = torch.cat([prompts.ids[row][prompts.real[row]], ids[row, :column]])[None]
        logits = ppo.loaded.model(input_ids=before, use_cache=False).logits[0, -1]
        logprobs.append(marked[row, column] * logits.log_softmax(-1)[ids[row, column]])
    loss = -torch.stack(logprobs).sum() / 3.5
    (0.3 * loss).backward()
    expected = [torch.zeros_like(one) if one.grad is None else one.grad.clone() for one in ppo.module.parameters()]
    ppo.optimizer.zero_grad()
    metrics, gradient = step_of(ppo, experience, monkeypatch)
    assert metrics["loss/ce_avg"] == pytest.approx(float(loss), abs=1e-5)
    assert metrics["loss/policy_avg"] == metrics["loss/value_avg"] == 0.0
    torch.testing.assert_close(gradient, torch.cat([one.flatten() for one in expected]), atol=1e-5, rtol=1e-4)
    assert all(math.isfinite(value) for value in metrics.values())


def test_without_a_coefficient_marks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ppo, experience = collected(tmp_path)
    plain, gradient = step_of(ppo, experience, monkeypatch)
    ppo, experience = collected(tmp_path)
    marked = weighted(experience, ce=torch.ones_like(experience.targets.advantages))
    metrics, same = step_of(ppo, marked, monkeypatch)
    assert torch.equal(same, gradient)
    assert metrics == plain


def test_a_position_can_be_left_out_or_count_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Weights of a half everywhere change nothing; of 0 they are the gradient without these answers."""
    ppo, experience = collected(tmp_path)
    _, gradient = step_of(ppo, experience, monkeypatch)
    half = experience.targets.weights["rl"] * 0.5
    ppo, experience = collected(tmp_path)
    _, same = step_of(ppo, weighted(experience, rl=half), monkeypatch)
    torch.testing.assert_close(same, gradient, atol=1e-6, rtol=1e-4)
    ppo, experience = collected(tmp_path)
    _, expected = step_of(ppo, rows_of(experience, slice(8, None)), monkeypatch)
    ppo, experience = collected(tmp_path)
    left_out = experience.targets.weights["rl"].clone()
    left_out[:8] = 0.0
    _, found = step_of(ppo, weighted(experience, rl=left_out), monkeypatch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert (found - gradient).abs().max() > 1e-3
