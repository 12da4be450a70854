"""Reference answers among the sampled ones: what they are paid, what is imitated, what of them is logged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from cagsr.advantage.supervised import control_reference, imitation_targets
from cagsr.commands.main import main
from cagsr.config import (
    DataConfig,
    ModelConfig,
    SalienceConfig,
    SamplingConfig,
    SupervisionConfig,
    TrainConfig,
    validate,
)
from cagsr.errors import ConfigError
from cagsr.flow import Returns, Targets
from cagsr.models.load import load_model
from cagsr.prompts.prepare import prepare_prompts
from cagsr.rollout.rows import prompt_batch
from cagsr.rollout.sample import sample_responses
from cagsr.scoring.reference_answers import ReferencePlayer


def by_hand(total: list[float]) -> tuple[Returns, Any, Targets]:
    """Two prompts with three answers each, the last of them the reference, two tokens long."""
    from test_advantage_estimate import conversations

    _, episodes, _, _ = conversations()
    rows = torch.tensor([0, 0, 0, 3, 3, 3])
    from cagsr.rollout.rows import take_rows

    episodes = take_rows(replace(episodes, turn=torch.zeros_like(episodes.turn)), rows)
    real = torch.arange(5).expand(6, 5) < 2
    prompts = replace(episodes.prompts, group=torch.tensor([7, 7, 7, 4, 4, 4]))
    given = torch.tensor([0, 0, 1, 0, 0, 1]).bool()
    episodes = replace(episodes, prompts=prompts, real=real, sampled=real, given=given)
    worth = torch.tensor(total)
    per_token = torch.zeros(6, 5)
    per_token[:, 1] = worth
    returns = Returns(worth, per_token, worth[:, None], {}, {})
    weights = {"rl": real.float(), "ce": torch.zeros(6, 5)}
    return returns, episodes, Targets(torch.ones(6, 5), torch.zeros(6, 5), weights)


@pytest.mark.parametrize(
    ("how", "paid"),
    [
        ("own", [1.0, 3.0, 2.0, 0.0, 1.0, 5.0]),
        ("best", [1.0, 3.0, 3.0, 0.0, 1.0, 5.0]),
        # A sampled answer is worth more than the first reference: it pulls no way. The second is the best there is.
        ("smooth", [1.0, 3.0, 2.0, 0.0, 1.0, 5.0]),
    ],
)
def test_what_a_reference_is_paid(how: Any, paid: list[float]):
    returns, episodes, _ = by_hand([1.0, 3.0, 2.0, 0.0, 1.0, 5.0])
    found = control_reference(returns, episodes, how)
    assert found.total.tolist() == paid
    torch.testing.assert_close(found.per_token.sum(1), found.total)
    torch.testing.assert_close(found.by_turn.sum(1), found.total)
    assert (found.per_token[:, 0] == 0).all()  # it is paid at the last token


def test_smooth_takes_the_mean_of_the_sampled_where_the_reference_is_no_better():
    returns, episodes, _ = by_hand([1.0, 3.0, -4.0, 0.0, 1.0, 1.0])
    assert control_reference(returns, episodes, "smooth").total.tolist() == [1.0, 3.0, 2.0, 0.0, 1.0, 0.5]
    assert control_reference(returns, replace(episodes, given=None), "smooth") is returns


@pytest.mark.parametrize(
    ("margin", "imitated"),
    [(0.0, [0, 1, 0, 0, 0, 1]), (4.0, [0, 1, 0, 0, 1, 0]), (3.9, [0, 1, 0, 0, 0, 1])],
)
def test_what_is_imitated(margin: float, imitated: list[int]):
    """Of the first prompt the model's own best is worth more than the reference; of the second by 4 less."""
    returns, episodes, targets = by_hand([1.0, 3.0, 2.0, 0.0, 1.0, 5.0])
    found = imitation_targets(targets, returns, episodes, margin)
    assert found.weights["ce"].sum(1).tolist() == [2.0 * one for one in imitated]
    assert (found.weights["ce"][:, 2:] == 0).all()
    assert not found.weights["rl"].any()
    assert not found.advantages.any()


def test_of_equal_answers_one_is_imitated():
    returns, episodes, targets = by_hand([3.0, 3.0, 2.0, 1.0, 1.0, 1.0])
    found = imitation_targets(targets, returns, episodes, 0.0)
    assert found.weights["ce"].sum(1).tolist() == [2, 0, 0, 2, 0, 0]


def rows_with_references(path: Path, count: int = 8) -> Path:
    rows = [
        {
            "prompt": f"the red cat {'near ' * (n % 3)}a house",
            "completion": "a big dog and the cat" if n % 2 else "a tree",
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_last_answer_of_each_prompt_is_its_reference(kind: str, tmp_path: Path):
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path / "start", kind)), device="cpu"))
    data = DataConfig(str(rows_with_references(tmp_path / "rows.jsonl")))
    prompts = prepare_prompts(data, SalienceConfig(weighting="uniform"), loaded.tokenizer, max_length=40).prompts[:2]
    sampling = SamplingConfig(num_generations=3, max_new_tokens=4)
    repeated = [one for one in prompts for _ in range(3)]
    torch.manual_seed(0)
    player = ReferencePlayer(loaded, 3, 4)
    found = player(lambda batch: sample_responses(loaded, batch, sampling), repeated, prompt_batch(loaded, prompts, 3))
    assert found.given is not None
    assert found.given.tolist() == [False, False, True] * 2
    assert found.completions[2] == "a tree"
    assert found.prompts.group.tolist()[:3] == [found.prompts.group[0]] * 3
    # Short ones end; what is longer than an answer may be is cut.
    assert found.ended[2]
    assert not found.ended[5]
    assert found.lengths.tolist()[5] == 4
    assert loaded.text_of(found.ids[5].tolist()).split() == ["a", "big", "dog", "and"]
    assert torch.equal(found.sampled, found.real)
    assert found.decoded_logprobs is not None
    assert (found.decoded_logprobs[found.given] == 0).all()
    assert (found.decoded_logprobs[~found.given][:, 0] < 0).all()


def run(folder: Path, name: str, **more: Any) -> list[dict[str, Any]]:
    given = {
        "--model": folder / "start", "--model.device": "cpu", "--data": folder / "rows.jsonl", "--output_dir": folder / name,
        "--steps": 12, "--run.batch_size": 2, "--num_generations": 3, "--max_new_tokens": 8, "--evaluation.held_out": 0,
        "--ppo.estimator": "rloo", "--salience.weighting": "uniform", "--run.sample_rows": 6, "--run.save_every": 0,
        "--ppo.learning_rate": 0.01, "--ppo.num_ppo_epochs": 1, "--ppo.kl_coef": 0, **more,
    }  # fmt: skip
    assert main(["train", *(str(part) for pair in given.items() for part in pair)]) == 0
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def likelihood(folder: Path, name: str) -> float:
    """Mean log-probability of the references under a run's model."""
    from cagsr.models.inputs import PassInputs
    from cagsr.scoring.answers import answered, encode_response

    loaded = load_model(ModelConfig(str(folder / name / "final"), device="cpu"))
    data = DataConfig(str(folder / "rows.jsonl"))
    prompts = prepare_prompts(data, SalienceConfig(weighting="uniform"), loaded.tokenizer, max_length=40).prompts
    own = [encode_response(loaded, one, str(one.prompt.columns["completion"])) for one in prompts]
    batch = answered(loaded, prompts, own)
    with torch.no_grad():
        logits = loaded.teacher_forced(PassInputs.of(batch))
    found = logits.log_softmax(-1).gather(2, batch.ids[..., None])[..., 0]
    return float(found[batch.real].mean())


def test_references_are_learned_in_the_same_stage(tmp_path: Path):
    tiny.save_model(tmp_path / "start")
    rows_with_references(tmp_path / "rows.jsonl")
    plain = run(tmp_path, "plain", **{"--reward.functions": "test_supervision.nothing"} | off())
    visurf = run(
        tmp_path, "visurf", **{"--supervision.mode": "visurf", "--supervision.reward": "own"}
        | {"--reward.functions": "test_supervision.says_tree_or_dog"} | off()
    )  # fmt: skip
    s3ft = run(
        tmp_path, "s3ft", **{"--supervision.mode": "s3ft", "--ppo.ce_coef": 1}
        | {"--reward.functions": "test_supervision.says_tree_or_dog"} | off()
    )  # fmt: skip
    before = likelihood(tmp_path, "plain")
    assert likelihood(tmp_path, "visurf") > before + 0.3
    assert likelihood(tmp_path, "s3ft") > before + 0.3
    assert {"loss/ce_avg"} <= s3ft[-1].keys()
    # What is logged is of the sampled answers: none of them is longer than its limit, references or not.
    samples = [json.loads(line) for line in (tmp_path / "visurf" / "samples.jsonl").read_text().splitlines()]
    assert {row["given"] for row in samples} == {True, False}
    assert {row["completion"] for row in samples if row["given"]} <= {"a tree", "a big dog and the cat"}
    assert len(plain) == len(visurf)


def off() -> dict[str, Any]:
    names = ("grounded_coverage", "repetition", "echo")
    return {f"--reward.{name}.weight": 0 for name in names}


def nothing(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def says_tree_or_dog(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(text in ("a tree", "a big dog and the cat")) for text in completions]


def test_what_does_not_go_together_is_refused(tmp_path: Path):
    base = TrainConfig(ModelConfig("m"), DataConfig("d"), "run", supervision=SupervisionConfig(mode="visurf"))
    with pytest.raises(ConfigError, match=r"references are single answers; leave --steps\.by out"):
        validate(replace(base, steps=replace(base.steps, by="lines")))
    with pytest.raises(ConfigError, match="set --num_generations 2 or more"):
        validate(
            replace(base, sampling=SamplingConfig(num_generations=1), reward=replace(base.reward, normalize="running"))
        )
    with pytest.raises(ConfigError, match=r"s3ft imitates: give --ppo\.ce_coef 1"):
        validate(replace(base, supervision=SupervisionConfig(mode="s3ft")))
    tiny.save_model(tmp_path / "start")
    tiny.save_prompts(tmp_path / "rows.jsonl")
    command = ["train", "--model", str(tmp_path / "start"), "--data", str(tmp_path / "rows.jsonl"), "--output_dir",
               str(tmp_path / "run"), "--supervision.mode", "visurf", "--model.device", "cpu"]  # fmt: skip
    assert main(command) == 2
    assert not (tmp_path / "run").exists()
