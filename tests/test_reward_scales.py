"""One reward, one scale: whatever judges answers by a reward gives them the same worth."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from cagsr.commands.main import main
from cagsr.compare.jobs import plan_jobs
from cagsr.compare.judge_policy import BATCH, best_of_n
from cagsr.compare.plan import Files, Method, Plan
from cagsr.config import DataConfig, ModelConfig, RewardConfig, SalienceConfig, SamplingConfig, TrainConfig
from cagsr.errors import RunError
from cagsr.integrations.verl import compute_score
from cagsr.models.load import load_model
from cagsr.reward.normalize import Normalizer
from cagsr.reward.values import TermValues
from cagsr.reward.weigh import Scales, weigh
from cagsr.runs.reward import read_run_reward
from cagsr.view.viewer import view


def normalized(
    values: list[float], group: list[int], normalize: Any = "within_prompt", clip: float = 0.0
) -> list[float]:
    """On the scale of these values themselves."""
    given, groups = TermValues.of(torch.tensor(values, dtype=torch.float64)), torch.tensor(group)
    normalizer = Normalizer(["x"], normalize, clip)
    normalizer.update({"x": given}, groups)
    return normalizer("x", given, groups).tolist()


def test_by_hand() -> None:
    values, group = [1.0, 3.0, 10.0, 10.0, math.nan], [7, 7, 9, 9, 9]
    # Within the groups: deviations -1, 1, 0, 0; squares sum to 2, with 4 - 2 degrees of freedom.
    assert normalized(values, group) == pytest.approx([-1.0, 1.0, 0.0, 0.0, 0.0])
    # Over all: mean 6, deviations -5, -3, 4, 4, mean square 66/4.
    spread = math.sqrt(16.5)
    assert normalized(values, group, "running") == pytest.approx(
        [-5 / spread, -3 / spread, 4 / spread, 4 / spread, 0.0]
    )
    assert normalized(values, group, "running", clip=1.0)[:3] == pytest.approx([-1.0, -3 / spread, 4 / spread])
    assert normalized([0.3, 0.3], [0, 0]) == [0.0, 0.0]
    # No prompt has two answers: centred on 2, divided by the deviation of all.
    assert normalized([1.0, 3.0], [0, 1]) == pytest.approx([-1.0, 1.0])
    # Answers without another to their prompt: centred on the mean of all, 6, in the unit of the deviation within prompts, 1;
    # as many degrees of freedom as above.
    assert normalized([1.0, 3.0, 10.0, 10.0, 6.0], [7, 7, 9, 9, 8])[4] == pytest.approx(0.0)
    assert normalized([2.0, 4.0, 1.0, 13.0], [0, 0, 1, 2], clip=5.0)[2:] == pytest.approx(
        [-4 / math.sqrt(2), 8 / math.sqrt(2)]
    )


@given(st.lists(st.floats(-3, 3), min_size=4, max_size=12), st.lists(st.floats(-3, 3), min_size=2, max_size=5))
@settings(deadline=None)
def test_answers_to_one_prompt_differ_by_the_same_however_they_come(learned: list[float], judged: list[float]) -> None:
    """Together, or one by one: with a run's scales nothing else in the file counts."""
    run = Normalizer(["x"], "within_prompt", 0.0)
    run.update({"x": TermValues.of(torch.tensor(learned).double())}, torch.arange(len(learned)) // 2)
    scales = Scales("run", run.state_dict())
    raw = {"x": torch.tensor(judged).double()}
    config = RewardConfig(clip=0.0)
    together = weigh(raw, {"x": 2.0}, config, torch.zeros(len(judged)), scales).total
    apart = weigh(raw, {"x": 2.0}, config, torch.arange(len(judged)), scales).total
    torch.testing.assert_close(together - together[0], apart - apart[0], atol=1e-9, rtol=1e-9)
    doubled = weigh(
        {"x": torch.cat([raw["x"], raw["x"] + 9])},
        {"x": 2.0},
        config,
        torch.arange(2 * len(judged)) // len(judged),
        scales,
    )
    torch.testing.assert_close(doubled.total[: len(judged)], together, atol=1e-9, rtol=1e-9)


def test_scales_of_other_terms_are_refused() -> None:
    scales = Scales("run", Normalizer(["y"], "within_prompt").state_dict())
    with pytest.raises(RunError, match=r"reward terms \['y'\], but this reward has \['x'\]"):
        weigh({"x": torch.ones(2)}, {"x": 1.0}, RewardConfig(), torch.zeros(2), scales)


PROMPTS = [
    "tell me about the red cat near a house",
    "tell me about the blue dog",
    "tell me about the green bird and a tree",
]
ANSWERS = [
    ["the red cat likes a house .", "a cat", "the cat the cat the cat the cat near a house", "red . red . red ."],
    ["the dog", "the blue dog sees the blue dog and the blue dog .", "blue dog"],
    ["a green bird near the tree", "a bird . a bird . a bird . a tree . a tree . a tree ."],
]
TERMS = [
    "--reward.focus.weight", "0.7", "--reward.self_certainty.weight", "0.4", "--reward.repetition.weight", "-1",
    "--reward.length.weight", "-0.3",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A start, and a short run that learned scales of five terms."""
    folder = tmp_path_factory.mktemp("scales")
    start = tiny.save_model(folder / "start")
    data = tiny.save_prompts(folder / "prompts.jsonl")
    flags = [
        "--run.batch_size",
        "4",
        "--num_generations",
        "3",
        "--max_new_tokens",
        "6",
        "--model.device",
        "cpu",
        "--steps",
        "2",
    ]
    quiet = ["--evaluation.held_out", "0", "--ppo.estimator", "rloo"]
    model = ["--model", str(start), "--data", str(data), "--output_dir", str(folder / "run")]
    assert main(["train", *model, *flags, *quiet, *TERMS, "--reward.clip", "0"]) == 0
    return {"start": start, "run": folder / "run", "folder": folder, "prompts": data}


def command(name: str, made: dict[str, Path], data: Path, *more: str) -> list[dict[str, Any]]:
    out = data.with_suffix(f".{name}.jsonl")
    same = ["--model", str(made["start"]), "--model.device", "cpu", "--data", str(data), "--output", str(out)]
    assert main([name, *same, *more]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def save(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rewards(made: dict[str, Path], path: Path, order: list[int], *more: str) -> dict[tuple[str, str], float]:
    rows = [{"prompt": PROMPTS[number], "answers": ANSWERS[number]} for number in order]
    ranked = command("rank", made, save(path, rows), "--candidates_column", "answers", *more)
    return {
        (row["prompt"], one["completion"]): one["reward"] for row in ranked for one in row["candidates"]
    }  # the first of a row is its winner


def winners(found: dict[tuple[str, str], float]) -> dict[str, str]:
    return {prompt: max((key for key in found if key[0] == prompt), key=found.__getitem__)[1] for prompt, _ in found}


def test_a_run_s_ranking_knows_no_other_rows(made: dict[str, Path], tmp_path: Path) -> None:
    from_run = ["--reward_from", str(made["run"])]
    all_rows = rewards(made, tmp_path / "a.jsonl", [0, 1, 2], *from_run)
    small = rewards(made, tmp_path / "b.jsonl", [2, 0, 1], *from_run, "--batch_size", "1")
    assert winners(small) == winners(all_rows)
    for key, value in small.items():
        assert value == pytest.approx(all_rows[key], abs=1e-4), key
    for number in range(3):
        alone = rewards(made, tmp_path / f"{number}.jsonl", [number], *from_run)
        for key, value in alone.items():
            assert value == pytest.approx(all_rows[key], abs=1e-4), key
    # Without a run the scales are those of the file: what the test above would catch.
    own = rewards(made, tmp_path / "own.jsonl", [0, 1, 2], *TERMS, "--salience.weighting", "uniform")
    alone = rewards(made, tmp_path / "own0.jsonl", [0], *TERMS, "--salience.weighting", "uniform")
    assert any(abs(value - own[key]) > 0.05 for key, value in alone.items())


def test_rank_score_and_view_agree_to_the_digit(made: dict[str, Path], tmp_path: Path) -> None:
    ranked = rewards(made, tmp_path / "a.jsonl", [0, 1, 2], "--reward_from", str(made["run"]))
    pairs = [{"prompt": p, "completion": one} for p, own in zip(PROMPTS, ANSWERS, strict=True) for one in reversed(own)]
    scored = command(
        "score", made, save(tmp_path / "pairs.jsonl", pairs), "--reward_from", str(made["run"]), "--batch_size", "2"
    )
    assert len(scored) == len(ranked)
    for row in scored:
        assert row["reward"] == pytest.approx(ranked[row["prompt"], row["completion"]], abs=1e-4)
    learned = read_run_reward(str(made["run"]))
    for prompt, own in zip(PROMPTS, ANSWERS, strict=True):
        seen = view(
            ModelConfig(str(made["start"]), device="cpu"),
            prompt,
            own,
            reward=learned.reward,
            attention=learned.attention,
            salience=learned.salience,
            frequency=learned.frequency,
            scales=learned.scales,
        )
        for answer in seen.measured.answers:
            assert answer.reward == pytest.approx(ranked[prompt, answer.text], abs=1e-4)


def test_a_file_with_many_answers_to_a_prompt_is_weighed_as_one_of_prompts(
    made: dict[str, Path], tmp_path: Path
) -> None:
    """Without a run too: IDF counts a prompt once, and the answers to it compete."""
    ranked = rewards(made, tmp_path / "a.jsonl", [0, 1, 2], *TERMS)
    pairs = [{"prompt": p, "completion": one} for p, own in zip(PROMPTS, ANSWERS, strict=True) for one in own]
    for row in command("score", made, save(tmp_path / "pairs.jsonl", pairs), *TERMS):
        assert row["reward"] == pytest.approx(ranked[row["prompt"], row["completion"]], abs=1e-4)


def test_a_prompt_in_two_rows_is_one_prompt_in_both(made: dict[str, Path], tmp_path: Path) -> None:
    data = save(
        tmp_path / "a.jsonl", [{"prompt": PROMPTS[0], "answers": ANSWERS[0][part]} for part in (slice(2), slice(2, 4))]
    )
    from_run = ["--reward_from", str(made["run"])]
    ranked = command("rank", made, data, "--candidates_column", "answers", *from_run)
    apart = {one["completion"]: one["reward"] for row in ranked for one in row["candidates"]}
    pairs = save(tmp_path / "pairs.jsonl", [{"prompt": PROMPTS[0], "completion": one} for one in ANSWERS[0]])
    for row in command("score", made, pairs, *from_run):
        assert row["reward"] == pytest.approx(apart[row["completion"]], abs=1e-4)


def test_a_run_without_the_file_lends_the_scales_of_its_checkpoint(made: dict[str, Path], tmp_path: Path) -> None:
    """As runs of the version before have it, and after a kill between the checkpoint and the file."""
    run = tmp_path / "run"
    shutil.copytree(made["run"], run)
    known = read_run_reward(str(run)).scales
    (run / "scales.json").unlink()
    assert known is not None
    assert read_run_reward(str(run)).scales == known
    (run / "scales.json").write_text("[1]")
    with pytest.raises(RunError, match="the scales in it can't be read"):
        read_run_reward(str(run))
    shutil.rmtree(run / "checkpoints")
    (run / "scales.json").unlink()
    with pytest.raises(RunError, match="nor a checkpoint"):
        read_run_reward(str(run))


def test_compare_s_best_of_n_is_rank_s(made: dict[str, Path], tmp_path: Path) -> None:
    prompts = save(tmp_path / "test.jsonl", [{"prompt": f"{text} {more}"} for text in PROMPTS for more in (".", ", .")])
    reward = dataclasses.replace(
        RewardConfig(),
        focus=dataclasses.replace(RewardConfig().focus, weight=0.7),
        self_certainty=dataclasses.replace(RewardConfig().self_certainty, weight=0.4),
        length=dataclasses.replace(RewardConfig().length, weight=-0.3),
        repetition=dataclasses.replace(RewardConfig().repetition, weight=-1.0),
    )
    config = TrainConfig(
        ModelConfig(str(made["start"]), device="cpu"),
        DataConfig(str(made["prompts"])),
        output_dir="",
        reward=reward,
        salience=SalienceConfig(weighting="uniform"),
        sampling=SamplingConfig(max_new_tokens=6),
    )
    plan = Plan(
        title="t",
        work=str(tmp_path),
        start="",
        files=Files(str(made["prompts"]), "", str(prompts)),
        configs=[],
        methods={"best": Method(kind="best_of_n", num_generations=4)},
        seeds=[0],
    )
    job = next(job for job in plan_jobs(plan) if job.target == "best")
    loaded = load_model(config.model, for_training=False)
    found = best_of_n(plan, job, config, loaded, seed=11)
    flags = [
        *TERMS,
        "--salience.weighting",
        "uniform",
        "--num_generations",
        "4",
        "--max_new_tokens",
        "6",
        "--seed",
        "11",
    ]
    ranked = command("rank", made, prompts, *flags, "--batch_size", str(BATCH // 4))
    assert [row["completion"] for row in ranked] == list(found.texts)
    assert [row["candidates"][0]["tokens"] for row in ranked] == found.tokens.tolist()


def test_what_a_run_can_t_lend_is_one_sentence(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = save(tmp_path / "a.jsonl", [{"prompt": PROMPTS[0], "answers": ANSWERS[0]}])
    base = [
        "rank",
        "--model",
        str(made["start"]),
        "--model.device",
        "cpu",
        "--data",
        str(data),
        "--candidates_column",
        "answers",
    ]
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.yaml").write_text((made["run"] / "config.yaml").read_text())
    cases = {
        "there is no config.yaml in it": ["--reward_from", str(tmp_path)],
        "frequency.json is missing or can't be read": ["--reward_from", str(old)],
        "--reward.coverage.threshold 0.4: the reward is that of the run": [
            "--reward_from", str(made["run"]), "--reward.coverage.threshold", "0.4",
        ],
        "pays self_certainty at temperature 1": ["--reward_from", str(made["run"]), "--sampling.temperature", "0.5"],
    }  # fmt: skip
    for sentence, flags in cases.items():
        assert main([*base, *flags]) == 2
        assert sentence in capsys.readouterr().err
    # The run's own settings may be given again.
    assert main([*base, "--reward_from", str(made["run"]), "--reward.focus.weight", "0.7"]) == 0
    assert f"on the scales of the run {made['run']}" in capsys.readouterr().err


def test_verl_s_answers_differ_as_rank_s(made: dict[str, Path], tmp_path: Path) -> None:
    """verl hands over one answer at a time: on a run's scales two of them differ by what they do side by side."""
    ranked = rewards(made, tmp_path / "a.jsonl", [0, 1, 2], "--reward_from", str(made["run"]))
    file = tmp_path / "reward.yaml"
    settings = "attention: {source: reference}\n"  # the one model there is: no contradiction
    file.write_text(f"model: {{path: {made['start']}, device: cpu}}\nreward_from: {made['run']}\n{settings}")
    for prompt, own in zip(PROMPTS, ANSWERS, strict=True):
        found = [
            compute_score("tiny", text, None, {"prompt": prompt, "num_turns": None}, config=str(file))["score"]
            for text in own
        ]
        for text, value in zip(own, found, strict=True):
            assert value - found[0] == pytest.approx(ranked[prompt, text] - ranked[prompt, own[0]], abs=1e-4)
