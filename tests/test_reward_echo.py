"""Echo: an answer that only says its prompt again is charged, on a scale of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cagsr.config import RewardConfig
from cagsr.flow import Prompt, RewardBatch
from cagsr.reward.function import RewardFunction
from cagsr.reward.normalize import FIXED, Normalizer
from cagsr.reward.terms.echo import Echo, EchoConfig, copied_share, echo
from cagsr.reward.values import TermValues
from cagsr.runs.folder import differing_keys, lacking

MEANING = "name[The Punter], eatType[pub], food[Italian], area[riverside]\nDescription:"


@pytest.mark.parametrize(
    ("answer", "share", "words"),
    [
        (MEANING, 1.0, 10),
        ("The Punter, pub, Italian, riverside", 1.0, 5),
        ("the punter is an ITALIAN pub by the riverside", 6 / 9, 9),  # the (twice), punter, italian, pub, riverside
        ("Nothing of it said here", 0.0, 5),
        ("...", 0.0, 0),
    ],
)
def test_the_share_of_words_that_the_prompt_holds(answer: str, share: float, words: int) -> None:
    assert copied_share(MEANING, answer) == (pytest.approx(share), words)


def test_only_what_is_above_the_allowed_share_is_charged() -> None:
    assert echo("a b c d", "a b c d e", allowed=0.0) == pytest.approx(0.8)
    assert echo("a b c d", "a b c d x", allowed=0.6) == pytest.approx((0.8 - 0.6) / 0.4)
    assert echo("a b c d", "a b c d x", allowed=0.8) == 0.0
    assert echo("a b c d", "a b c", shortest=4) == 0.0
    assert echo("a b c d", "a b c", shortest=3) == 1.0
    # What a chat template writes is nobody's word.
    assert echo("user a b c d", "user user user user user", template=[(0, 4)]) == 0.0


def test_an_echo_costs_its_weight_however_rare_it_is(make_reward_batch: Callable[..., RewardBatch]) -> None:
    batch = make_reward_batch(prompts=2, generations=3)
    prompts = tuple(Prompt(row=row, text="one two three four five") for row in (1, 1, 1, 2, 2, 2))
    answers = ("one two three four five", "a b c d e", "f g h i j", "k l m n o", "p q r s t", "u v w x y")
    asked = batch.episodes
    episodes = replace(asked, prompts=replace(asked.prompts, prompts=prompts), completions=answers)
    reward = RewardFunction([Echo(EchoConfig())], [-3.0], "within_prompt")
    found = reward(replace(batch, episodes=episodes))
    assert found.terms["echo"].tolist() == [1, 0, 0, 0, 0, 0]
    torch.testing.assert_close(found.total, torch.tensor([-2.0, 1.0, 1.0, 0.0, 0.0, 0.0]))


def test_terms_with_a_scale_of_their_own_are_not_brought_to_the_common_one() -> None:
    assert FIXED == {"echo": 1.0}
    values, group = torch.tensor([0.0, 0.5, 0.0, 0.0]), torch.tensor([0, 0, 1, 1])
    both = {name: TermValues.of(values) for name in ("echo", "focus")}
    normalizer = Normalizer(["echo", "focus"], "within_prompt")
    normalizer.update(both, group)
    assert normalizer("echo", both["echo"], group).tolist() == [-0.25, 0.25, 0.0, 0.0]
    assert float(normalizer("focus", both["focus"], group).abs().max()) == pytest.approx(1.0)  # 0.25 * sqrt(2 / 0.125)


def test_a_run_from_before_the_term_was_trained_without_it(tmp_path: Path) -> None:
    from cagsr.config import DataConfig, ModelConfig, TrainConfig
    from cagsr.parse import to_yaml

    new = TrainConfig(ModelConfig("m"), DataConfig("d"), output_dir="o")
    before = _without_section(to_yaml(new), "echo")
    assert "echo" not in before
    assert lacking({}) == {"reward.echo.weight": 0.0}
    assert lacking({"reward.echo.weight": -1.0}) == {}
    assert differing_keys(before, to_yaml(new)) == ["reward.echo.weight"]
    assert differing_keys(before, to_yaml(replace(new, reward=without_echo()))) == []


def without_echo() -> RewardConfig:
    return RewardConfig(echo=EchoConfig(weight=0.0))


def _without_section(text: str, name: str) -> str:
    import yaml

    tree = yaml.safe_load(text)
    del tree["reward"][name]
    return yaml.safe_dump(tree)
