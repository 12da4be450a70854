"""The weighted sum: normalisation over the run, where it is paid, what is logged, what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from threading import Barrier, Thread

import pytest
import torch
from torch import Tensor

import tiny
from cagsr.config import (
    CopyCoverageConfig,
    CoverageConfig,
    FocusConfig,
    GroundedCoverageConfig,
    LengthConfig,
    MeanMassConfig,
    RepetitionConfig,
    RewardConfig,
    SelfCertaintyConfig,
    UnsupportedConfig,
    validate,
)
from cagsr.errors import ConfigError, RewardError, RunError
from cagsr.flow import Attention, Returns, RewardBatch
from cagsr.models.texts import token_texts
from cagsr.reward import build
from cagsr.reward.build import reward_warnings, weighted_terms
from cagsr.reward.function import RewardFunction
from cagsr.reward.metrics import flat_share, reward_metrics, variance_share, within_group_correlation
from cagsr.reward.micro_batch import TermVisitor
from cagsr.reward.registry import Resources
from cagsr.reward.term import PartialValues, RewardTerm, by_micro_batch

MakeBatch = Callable[..., RewardBatch]

RESOURCES = Resources(texts=token_texts(tiny.tokenizer()))  # each token says something of its own
build_reward = partial(build.build_reward, resources=RESOURCES)

EVERYTHING = RewardConfig(
    coverage=CoverageConfig(weight=1.0, dense=True),
    copy_coverage=CopyCoverageConfig(weight=0.5),
    grounded_coverage=GroundedCoverageConfig(weight=1.0),
    mean_mass=MeanMassConfig(weight=0.25),
    focus=FocusConfig(weight=-0.5, entropy_floor=0.1),
    repetition=RepetitionConfig(weight=-1.0, n=2, dense=True),
    self_certainty=SelfCertaintyConfig(weight=0.7),
    length=LengthConfig(weight=-0.1, target=3),
)


@dataclass
class Given:
    """A term that returns what it is given."""

    values: Tensor | PartialValues
    name: str = "given"

    def __call__(self, batch: RewardBatch) -> Tensor | PartialValues:
        return self.values


def sequence(values: list[float]) -> Given:
    return Given(torch.tensor(values))


def pick(batch: RewardBatch, rows: Tensor) -> RewardBatch:
    """The same batch with these rows only, in this order."""
    episodes, readings, attention = batch.episodes, batch.readings, batch.attention
    assert batch.reference_logprobs is not None
    assert attention is not None
    prompts = episodes.prompts
    return RewardBatch(
        episodes=replace(
            episodes,
            prompts=replace(
                prompts,
                prompts=tuple(prompts.prompts[i] for i in rows.tolist()),
                **{key: getattr(prompts, key)[rows] for key in ("ids", "real", "words", "salience", "group")},
            ),
            completions=tuple(episodes.completions[i] for i in rows.tolist()),
            **{key: getattr(episodes, key)[rows] for key in ("ids", "real", "sampled", "turn", "ended")},
        ),
        readings=replace(readings, certainty=readings.certainty[rows]),
        reference_logprobs=batch.reference_logprobs[rows],
        attention=Attention(attention.maps[rows], attention.words[rows]),
    )


def widen(batch: RewardBatch, tokens: int) -> RewardBatch:
    """The same batch with more padding, filled with nonsense that nobody may read."""

    def pad(x: Tensor, value: float) -> Tensor:
        filler = torch.full((x.shape[0], tokens, *x.shape[2:]), value, dtype=torch.float32).to(x.dtype)
        return torch.cat([x, filler], dim=1)

    def left(x: Tensor, value: float) -> Tensor:
        return torch.cat([torch.full((x.shape[0], tokens), value).to(x.dtype), x], dim=1)

    episodes, prompts, attention = batch.episodes, batch.episodes.prompts, batch.attention
    assert attention is not None
    maps = pad(attention.maps, math.nan)
    nothing = torch.full((*maps.shape[:2], tokens), 0.5)
    return RewardBatch(
        episodes=replace(
            episodes,
            prompts=replace(
                prompts, ids=left(prompts.ids, 0), real=left(prompts.real, 0), words=left(prompts.words, -1)
            ),
            ids=pad(episodes.ids, 1),
            real=pad(episodes.real, 0),
            sampled=pad(episodes.sampled, 0),
            turn=pad(episodes.turn, 0),
        ),
        readings=replace(batch.readings, certainty=pad(batch.readings.certainty, math.inf)),
        reference_logprobs=None,
        attention=Attention(torch.cat([nothing, maps], dim=2), pad(attention.words, math.nan)),
    )


# --- normalisation and payment


def test_z_scores_by_hand(make_reward_batch: MakeBatch) -> None:
    batch = make_reward_batch(prompts=1, generations=4)
    # Mean 2.5, population deviation sqrt(1.25).
    reward = RewardFunction([sequence([1.0, 2.0, 3.0, 4.0])], [2.0], "running")(batch)
    expected = 2 * (torch.tensor([1.0, 2.0, 3.0, 4.0]) - 2.5) / math.sqrt(1.25)
    torch.testing.assert_close(reward.total, expected)
    torch.testing.assert_close(reward.terms["given"], torch.tensor([1.0, 2.0, 3.0, 4.0]))
    last = batch.episodes.sampled.sum(1) - 1
    torch.testing.assert_close(reward.per_token.gather(1, last[:, None])[:, 0], expected)
    assert int((reward.per_token != 0).sum()) == 4


def test_clipping_and_raw_values(make_reward_batch: MakeBatch) -> None:
    batch = make_reward_batch(prompts=1, generations=4)
    term = sequence([0.0, 0.0, 0.0, 8.0])  # z of the last: (8 - 2) / sqrt(12) = 1.73
    clipped = RewardFunction([term], [1.0], "running", clip=1.0)(batch)
    torch.testing.assert_close(clipped.total, torch.tensor([-2 / math.sqrt(12)] * 3 + [1.0]))
    raw = RewardFunction([term], [-0.5], normalize="none", clip=1.0)(batch)
    torch.testing.assert_close(raw.total, torch.tensor([0.0, 0.0, 0.0, -4.0]))


def test_dense_gains_are_scaled_in_place_and_centred_at_the_end(make_reward_batch: MakeBatch) -> None:
    batch = make_reward_batch(prompts=1, generations=2, response=3, shortest=3)
    gains = torch.tensor([[1.0, 0.0, 0.0], [0.0, 3.0, 0.0]])  # totals 1 and 3: mean 2, deviation 1
    reward = RewardFunction([Given(gains)], [10.0], "running")(batch)
    torch.testing.assert_close(reward.per_token, torch.tensor([[10.0, 0.0, -20.0], [0.0, 30.0, -20.0]]))
    torch.testing.assert_close(reward.total, torch.tensor([-10.0, 10.0]))


def test_a_term_without_variance_contributes_nothing(make_reward_batch: MakeBatch) -> None:
    batch = make_reward_batch()
    noise = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.1]) * torch.tensor([1, 1 + 1e-7, 1, 1, 1, 1])
    dense = batch.episodes.sampled / batch.episodes.sampled.sum(1, keepdim=True)
    reward = RewardFunction([Given(noise, "noise"), Given(dense, "dense")], [1.0, 1.0], "running")(batch)
    assert (reward.total == 0).all()
    assert (reward.per_token == 0).all()


@pytest.mark.parametrize("normalize", ["running", "none"])
def test_rows_of_per_token_sum_to_the_total(make_reward_batch: MakeBatch, normalize: str) -> None:
    config = replace(EVERYTHING, normalize=normalize, clip=0.5)  # type: ignore[arg-type]
    reward_function = build_reward(config, device="cpu")
    for seed in range(5):
        batch = make_reward_batch(seed=seed, prompts=3, generations=4)
        reward = reward_function(batch)
        torch.testing.assert_close(reward.per_token.sum(1), reward.total, atol=2e-6, rtol=0)
        torch.testing.assert_close(sum(reward.contributions.values()), reward.total, atol=2e-6, rtol=0)
        assert (reward.per_token[~batch.episodes.sampled] == 0).all()


def test_answers_without_tokens_are_paid_nothing_on_tokens(make_reward_batch: MakeBatch) -> None:
    batch = make_reward_batch(shortest=0, seed=3, prompts=4)
    empty = ~batch.episodes.sampled.any(1)
    assert empty.any()
    reward = build_reward(EVERYTHING, device="cpu")(batch)
    assert torch.isfinite(reward.total).all()
    assert (reward.per_token[empty] == 0).all()


def test_padding_and_order_change_nothing(make_reward_batch: MakeBatch) -> None:
    batch = make_reward_batch(prompts=4, generations=4)
    plain = build_reward(EVERYTHING, device="cpu")(batch)
    wide = build_reward(EVERYTHING, device="cpu")(widen(batch, 4))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    shuffled = build_reward(EVERYTHING, device="cpu")(pick(batch, order))
    for name, values in plain.terms.items():
        torch.testing.assert_close(wide.terms[name], values, atol=1e-6, rtol=0)
        torch.testing.assert_close(shuffled.terms[name], values[order], atol=1e-6, rtol=0)
    torch.testing.assert_close(wide.per_token[:, :-4], plain.per_token, atol=1e-5, rtol=0)
    torch.testing.assert_close(shuffled.total, plain.total[order], atol=1e-5, rtol=0)


def test_batches_one_after_another_equal_one_big_batch(make_reward_batch: MakeBatch) -> None:
    batch = make_reward_batch(prompts=5, generations=4)
    big, small = build_reward(EVERYTHING, device="cpu"), build_reward(EVERYTHING, device="cpu")
    whole = big(batch)
    for rows in (torch.arange(4), torch.arange(4, 12), torch.arange(12, 20)):  # a prompt's answers stay together
        small(pick(batch, rows))
    for name, state in big.state_dict().items():
        assert small.state_dict()[name] == pytest.approx(state, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(small(batch, update=False).total, whole.total, atol=1e-5, rtol=0)


def test_processes_share_their_moments(make_reward_batch: MakeBatch) -> None:
    batch = make_reward_batch(prompts=4, generations=4)
    whole = build_reward(EVERYTHING, device="cpu")(batch)
    inbox: list[Tensor | None] = [None, None]
    barrier = Barrier(2, timeout=20)
    parts: dict[int, Returns] = {}

    def process(rank: int, rows: Tensor) -> None:
        def reduce(tensor: Tensor) -> Tensor:
            inbox[rank] = tensor
            barrier.wait()
            total = inbox[0] + inbox[1]  # type: ignore[operator]
            barrier.wait()
            return total

        parts[rank] = build_reward(EVERYTHING, device="cpu", reduce=reduce)(pick(batch, rows))

    shares = (torch.arange(4), torch.arange(4, 16))
    threads = [Thread(target=process, args=(rank, rows), daemon=True) for rank, rows in enumerate(shares)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(torch.cat([parts[0].total, parts[1].total]), whole.total, atol=1e-5, rtol=0)


def test_a_failure_on_another_process_is_an_error_here(make_reward_batch: MakeBatch) -> None:
    with pytest.raises(RewardError, match="another process"):
        RewardFunction([sequence([1.0] * 6)], [1.0], "running", reduce=lambda tensor: tensor + 1)(make_reward_batch())


def test_without_update_the_moments_stay(make_reward_batch: MakeBatch) -> None:
    reward_function = build_reward(EVERYTHING, device="cpu")
    assert (reward_function(make_reward_batch(), update=False).total == 0).all()
    reward_function(make_reward_batch())
    before = reward_function.state_dict()
    reward_function(make_reward_batch(seed=1), update=False)
    assert reward_function.state_dict() == before


def test_state_survives_json_bit_for_bit(make_reward_batch: MakeBatch) -> None:
    first, second = build_reward(EVERYTHING, device="cpu"), build_reward(EVERYTHING, device="cpu")
    first(make_reward_batch(seed=1))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    batch = make_reward_batch(seed=2)
    assert torch.equal(first(batch).per_token, second(batch).per_token)
    assert first.state_dict() == second.state_dict()
    with pytest.raises(RunError, match="coverage"):
        build_reward(RewardConfig(), device="cpu").load_state_dict(first.state_dict())


def test_answers_a_term_does_not_apply_to(make_reward_batch: MakeBatch) -> None:
    batch = make_reward_batch(prompts=1, generations=4)
    values = PartialValues(torch.tensor([1.0, math.nan, 3.0, 50.0]), torch.tensor([True, False, True, False]))
    reward_function = RewardFunction([Given(values)], [1.0], "running")
    reward = reward_function(batch)
    torch.testing.assert_close(reward.total, torch.tensor([-1.0, 0.0, 1.0, 0.0]))
    assert reward.terms["given"].isnan().tolist() == [False, True, False, True]
    state = reward_function.state_dict()["given"]
    assert (state["count"], state["mean"], state["m2"]) == (2.0, 2.0, 2.0)
    metrics = reward_metrics(reward, batch.episodes.sampled.sum(dim=1).float(), batch.episodes.prompts.group)
    assert metrics["rewards/given/mean"] == 2.0
    assert all(math.isfinite(value) for value in metrics.values())


# --- what is refused


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_names_term_and_prompt(make_reward_batch: MakeBatch, bad: float) -> None:
    batch = make_reward_batch()
    long = replace(batch.episodes.prompts.prompts[4], row=17, text="a\nlong prompt " + "x" * 200)
    prompts = (*batch.episodes.prompts.prompts[:4], long, *batch.episodes.prompts.prompts[5:])
    batch = replace(batch, episodes=replace(batch.episodes, prompts=replace(batch.episodes.prompts, prompts=prompts)))
    reward_function = RewardFunction(
        [sequence([1.0] * 6), Given(torch.tensor([1.0] * 4 + [bad, 2.0]), "odd")], [1, 1], "running"
    )
    with pytest.raises(RewardError, match=r"'odd' gave (nan|inf) .*row 17") as caught:
        reward_function(batch)
    assert "a long prompt" in str(caught.value)
    assert "x" * 66 in str(caught.value)
    assert "x" * 67 not in str(caught.value)
    assert reward_function.state_dict()["given"]["count"] == 0  # nothing was taken in


def test_padding_may_hold_anything(make_reward_batch: MakeBatch) -> None:
    batch = make_reward_batch()
    dense = torch.where(batch.episodes.sampled, 1.0, math.nan)
    assert torch.isfinite(RewardFunction([Given(dense)], [1.0], "running")(batch).per_token).all()


def test_wrong_returns_are_named(make_reward_batch: MakeBatch) -> None:
    with pytest.raises(RewardError, match=r"'given' returned shape \(5,\)"):
        RewardFunction([sequence([1.0] * 5)], [1.0], "running")(make_reward_batch())
    with pytest.raises(RewardError, match="returned list"):
        RewardFunction([Given([1.0] * 6)], [1.0], "running")(make_reward_batch())  # type: ignore[arg-type]


def test_a_term_without_attention_says_so(make_reward_batch: MakeBatch) -> None:
    with pytest.raises(RewardError, match="'grounded_coverage' reads the attention, but none was captured"):
        build_reward(RewardConfig(), device="cpu")(replace(make_reward_batch(), attention=None))


ZERO = RewardConfig(grounded_coverage=GroundedCoverageConfig(weight=0.0), repetition=RepetitionConfig(weight=0.0))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ZERO, "every weight is 0 but"),
        (replace(ZERO, functions=["m.f"], function_weights=[0.0]), "every weight is 0"),
        (RewardConfig(functions=["m.f"], function_weights=[1.0, 2.0]), "2 values for 1 functions"),
        (RewardConfig(models=["a", "b"], model_weights=[1.0]), "1 values for 2 models"),
        (
            RewardConfig(coverage=CoverageConfig(threshold=0.0)),
            r"reward\.coverage\.threshold 0.0: must be above 0.*, up to 1",
        ),
        (
            RewardConfig(coverage=CoverageConfig(weight=math.nan)),
            r"reward\.coverage\.weight nan: must be a finite number",
        ),
        (
            RewardConfig(focus=FocusConfig(entropy_floor=1.0)),
            r"reward\.focus\.entropy_floor 1.0: must be from 0.* to below 1",
        ),
        (RewardConfig(repetition=RepetitionConfig(n=0)), r"reward\.repetition\.n 0: must be 1 or more"),
        (RewardConfig(length=LengthConfig(target=-1)), r"reward\.length\.target -1: must be 0 or more"),
        (RewardConfig(clip=-1.0), r"reward\.clip -1.0: must be 0.* or more"),
        (
            RewardConfig(functions=["m.f"], function_weights=[math.inf]),
            r"reward\.function_weights inf: must be a finite",
        ),
        (replace(ZERO, models=["m"], model_weights=[math.nan]), r"reward\.model_weights nan: must be a finite"),
        (RewardConfig(grounded_coverage=GroundedCoverageConfig(threshold=1.5)), r"grounded_coverage\.threshold"),
    ],
)
def test_bad_configs(config: RewardConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate(config, "reward.")
    with pytest.raises(ConfigError, match=words):
        reward_warnings(config)
    with pytest.raises(ConfigError, match=words):
        build_reward(config, device="cpu")


def test_warnings_name_what_goes_wrong() -> None:
    assert reward_warnings(RewardConfig()) == []
    assert any("short answers" in text for text in reward_warnings(RewardConfig(mean_mass=MeanMassConfig(weight=1.0))))
    alone = replace(ZERO, self_certainty=SelfCertaintyConfig(1.0))
    penalised = replace(alone, repetition=RepetitionConfig(weight=-1.0), unsupported=UnsupportedConfig(weight=-1.0))
    for config in (alone, penalised):  # what is charged keeps nothing from collapsing
        assert any("collapse" in text for text in reward_warnings(config))
    for company in ({"coverage": CoverageConfig(weight=1.0)}, {"functions": ["m.f"]}, {"models": ["m"]}):
        assert not any("collapse" in text for text in reward_warnings(replace(penalised, **company)))
    assert any("saying less" in text for text in reward_warnings(penalised))
    assert any("repetition" in text for text in reward_warnings(RewardConfig(repetition=RepetitionConfig(weight=1.0))))


def test_two_terms_of_one_name() -> None:
    with pytest.raises(ConfigError, match="two reward terms are called 'given'"):
        RewardFunction([sequence([1.0]), sequence([1.0])], [1.0, 1.0], "running")


def test_builtin_terms_are_terms() -> None:
    terms = weighted_terms(RewardConfig(), "cpu", RESOURCES, every=True)
    assert [(term.name, weight) for term, weight in terms] == [
        ("coverage", 0.0), ("copy_coverage", 0.0), ("grounded_coverage", 1.0), ("mean_mass", 0.0), ("focus", 0.0),
        ("echo", -5.0), ("repetition", -0.3), ("history_repetition", 0.0), ("self_certainty", 0.0),
        ("length", 0.0), ("agreement", 0.0),
    ]  # fmt: skip
    assert all(isinstance(term, RewardTerm) for term, _ in terms)
    assert [term.name for term, _ in weighted_terms(RewardConfig(), "cpu", RESOURCES)] == [
        "grounded_coverage",
        "echo",
        "repetition",
    ]


def test_a_term_with_a_weight_gets_what_it_needs_or_says_what_is_missing() -> None:
    off = replace(ZERO, copy_coverage=CopyCoverageConfig(weight=0.1))
    with pytest.raises(ValueError, match="the reward term copy_coverage needs texts"):
        build.build_reward(off, device="cpu")
    with pytest.raises(ValueError, match="the reward term unsupported needs associations"):
        build_reward(replace(ZERO, unsupported=UnsupportedConfig(weight=-1.0)), device="cpu")


def test_which_attention_a_reward_needs(make_reward_batch: MakeBatch) -> None:
    episodes = make_reward_batch().episodes

    def read(config: RewardConfig) -> tuple[list[str], bool, bool]:
        """What is worked out where the attention is read, whether it is read, and whether its maps outlive the reading."""
        terms = build_reward(config, device="cpu").terms
        visitor = TermVisitor(episodes, terms, "sum")
        return (
            [term.name for term in terms if by_micro_batch(term)],
            visitor.wants_attention,
            visitor.attention() is not None,
        )

    assert read(RewardConfig()) == (["grounded_coverage"], True, False)
    assert read(EVERYTHING) == (["coverage", "copy_coverage", "grounded_coverage", "mean_mass", "focus"], True, False)
    assert read(replace(ZERO, self_certainty=SelfCertaintyConfig(1.0))) == ([], False, False)
    # A term of the user's may look at the maps.
    own = TermVisitor(episodes, [*build_reward(EVERYTHING, device="cpu").terms, sequence([1.0])], "sum")
    assert own.attention() is not None


# --- what is logged


def test_correlation_is_within_groups() -> None:
    # Between the groups x rises with y, within each it falls.
    x, y = torch.tensor([1.0, 2.0, 11.0, 12.0]), torch.tensor([2.0, 1.0, 12.0, 11.0])
    assert within_group_correlation(x, y, torch.tensor([0, 0, 1, 1])) == pytest.approx(-1.0)
    assert within_group_correlation(x, y, torch.tensor([0, 0, 0, 0])) > 0.9
    assert within_group_correlation(x, y, torch.tensor([0, 1, 2, 3])) == 0.0
    assert within_group_correlation(torch.full((4,), math.nan), y, torch.tensor([0, 0, 1, 1])) == 0.0


def test_variance_shares_by_hand_sum_to_one() -> None:
    # a = 0 1 2, b = 0 2 4: total 0 3 6, var 6; cov(a, total) = 2, cov(b, total) = 4.
    a, b = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 2.0, 4.0])
    assert variance_share(a, a + b) == pytest.approx(1 / 3)
    assert variance_share(b, a + b) == pytest.approx(2 / 3)
    assert variance_share(a, torch.zeros(3)) == 0.0


def test_prompts_whose_answers_are_all_worth_the_same():
    nan = float("nan")
    values = torch.tensor([1.0, 1.0 + 1e-8, 0.0, 0.0, 0.0, 0.5, nan, 2.0, 7.0])
    group = torch.tensor([0, 0, 1, 1, 2, 2, 2, 3, 4])  # groups 3 and 4 have one answer, which is not compared
    assert flat_share(values, group) == pytest.approx(2 / 3)
    assert flat_share(values[-2:], group[-2:]) == 0.0


def test_metrics_of_a_reward(make_reward_batch: MakeBatch) -> None:
    batch = make_reward_batch(prompts=4, generations=4)
    reward = build_reward(replace(EVERYTHING, length=LengthConfig(weight=0.1)), device="cpu")(batch)
    metrics = reward_metrics(reward, batch.episodes.sampled.sum(dim=1).float(), batch.episodes.prompts.group)
    for name in [*reward.terms, "total"]:
        assert {f"rewards/{name}/{what}" for what in ("mean", "std", "length_correlation")} <= set(metrics)
    assert metrics["rewards/length/length_correlation"] == pytest.approx(1.0)
    assert metrics["rewards/length/mean"] == pytest.approx(float(batch.episodes.sampled.sum(1).float().mean()))
    assert sum(metrics[f"rewards/{name}/share"] for name in reward.terms) == pytest.approx(1.0)


def test_within_prompt_compares_answers_to_one_prompt_only(make_reward_batch: MakeBatch) -> None:
    batch = make_reward_batch(prompts=2, generations=2)
    # means 2 and 105, deviations -1 1 -5 5: variance within 52 / (4 - 2) = 26, whatever lies between the prompts
    reward = RewardFunction([sequence([1.0, 3.0, 100.0, 110.0])], [2.0], "within_prompt")(batch)
    expected = torch.tensor([-1.0, 1.0, -5.0, 5.0]) * 2 / math.sqrt(26)
    torch.testing.assert_close(reward.total, expected)
    torch.testing.assert_close(reward.per_token.sum(1), expected)


def test_within_prompt_needs_two_answers_to_a_prompt(make_reward_batch: MakeBatch) -> None:
    with pytest.raises(ConfigError, match=r"--reward\.normalize running"):
        RewardFunction([sequence([1.0, 3.0])], [1.0], "within_prompt")(make_reward_batch(prompts=2, generations=1))


def test_within_prompt_leaves_out_answers_the_term_does_not_apply_to(make_reward_batch: MakeBatch) -> None:
    batch = make_reward_batch(prompts=1, generations=3)
    values = PartialValues(torch.tensor([1.0, 99.0, 3.0]), torch.tensor([True, False, True]))
    function = RewardFunction([Given(values)], [1.0], "within_prompt")
    torch.testing.assert_close(function(batch).total, torch.tensor([-1.0, 0.0, 1.0]) / math.sqrt(2))
    assert json.loads(json.dumps(function.state_dict()))["given"]["within_count"] == 1.0
