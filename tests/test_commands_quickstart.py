"""``cagsr quickstart``: one small run through the command line, what it leaves, and what it refuses to touch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import AutoTokenizer

from cagsr.commands.main import main
from cagsr.config import DataConfig, ModelConfig, SalienceConfig, SamplingConfig
from cagsr.evaluation import metrics
from cagsr.evaluation.matched_entropy import answers_at, matching_temperature
from cagsr.models.load import load_model
from cagsr.prompts.prepare import prepare_prompts
from cagsr.quickstart.before_after import BATCH, DRAWS, MEASURES, Answered, BeforeAfter
from cagsr.quickstart.quickstart_report import remark, verdict
from cagsr.quickstart.stages import MAX_NEW_TOKENS
from cagsr.quickstart.task import facts_covered, facts_said_again, make_pairs, make_prompts, wrong_facts
from slow import every_pass_is_long

SMALL = ["--pairs", "64", "--sft_steps", "3", "--prompts", "12", "--held_out", "8", "--steps", "1", "--batch_size", "2"]
MARA = "Introduce this person. name: Mara; job: baker; city: Lisbon; pet: parrot; hobby: chess."


def quickstart(folder: Path, *flags: str) -> int:
    return main(["quickstart", "--output_dir", str(folder), *SMALL, *flags])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished small quickstart and what it printed."""
    folder = tmp_path_factory.mktemp("quick") / "quickstart"
    with pytest.MonkeyPatch.context() as patch:
        import io
        import sys

        printed, progress = io.StringIO(), io.StringIO()
        patch.setattr(sys, "stdout", printed)
        patch.setattr(sys, "stderr", progress)
        every_pass_is_long(patch)
        assert quickstart(folder) == 0
    (folder.parent / "progress.txt").write_text(progress.getvalue())
    return folder, printed.getvalue()


def test_all_of_its_work_says_where_it_is(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    lines = (folder.parent / "progress.txt").read_text().splitlines()
    for pattern in (
        r"^step 2/3 \(\d:\d\d, \d:\d\d left\)  loss \S+",
        r"^answering held-out prompts 0/1 batches .*> sampling \d+/64 tokens",
        r"^step 0/1 .*> scoring 0/1 batches",
        r"^answering and judging 2/5 columns .*> answering 0/8 prompts .*> sampling",
        r"^answering and judging 4/5 columns .*> judging by perplexity 0/1 batches",
    ):
        assert any(re.search(pattern, line) for line in lines), pattern
    for name in ("start", "judge"):
        assert f"Done: the model is in {folder / name}. 3 steps, training loss" in printed


def test_it_leaves_everything_it_names(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    for name in (
        "report.md",
        "results.json",
        "answers.jsonl",
        "prompts.jsonl",
        "held_out.jsonl",
        "pairs.jsonl",
        "start/model.safetensors",
        "judge/model.safetensors",
        "run/final/model.safetensors",
        "run/curves.png",
        "run/metrics.jsonl",
        "run/config.yaml",
    ):
        assert (folder / name).stat().st_size > 0, name
    for words in ("1/4", "2/4", "3/4", "4/4", "Three examples", "facts covered", "cagsr diagnose", "cagsr train"):
        assert words in printed


def test_its_prompts_are_unlabelled_and_the_three_sets_never_meet(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    prompts, held_out, pairs = (rows(folder / f"{name}.jsonl") for name in ("prompts", "held_out", "pairs"))
    assert all(set(row) == {"prompt"} for row in prompts)
    sets = [{row["prompt"] for row in some} for some in (prompts, held_out, pairs)]
    assert [len(one) for one in sets[:2]] == [12, 8]
    assert len(set.union(*sets)) == sum(map(len, sets))


def test_the_reward_has_no_checker_and_the_models_are_the_ones_named(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    config = yaml.safe_load((folder / "run/config.yaml").read_text())
    assert config["reward"]["functions"] == []
    assert config["reward"]["models"] == []
    assert config["model"]["path"] == str(folder / "start")
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("start", "judge", "run/final")]
    assert len(set(weights)) == 3


def test_every_number_of_the_table_can_be_recomputed_from_the_answers(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    results, answers = json.loads((folder / "results.json").read_text()), rows(folder / "answers.jsonl")
    columns = list(results["columns"])
    assert columns[0] == "before"
    assert columns[2:] == ["after", "before, greedy", "after, greedy"]
    assert set(results["rows"]) == {measure.key for measure in MEASURES}
    checks = {
        "facts_covered": facts_covered,
        "wrong_facts": wrong_facts,
        "said_again": facts_said_again,
        "words": lambda prompt, answer: len(metrics.words(answer)),
    }
    for key, check in checks.items():
        for column in columns:
            mean = np.mean([check(row["prompt"], answer) for row in answers for answer in row[column]])
            assert results["rows"][key][column] == pytest.approx(float(mean)), (key, column)
    shown = f"{results['rows']['words']['after']:.1f}"
    assert shown in printed
    assert shown in (folder / "report.md").read_text()


def test_before_is_the_start_and_after_the_trained_model(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = finished
    answers = rows(folder / "answers.jsonl")
    for model, column in (("start", "before, greedy"), ("run/final", "after, greedy")):
        output = tmp_path / "answers.jsonl"
        flags = ["--sampling.temperature", "0", "--sampling.max_new_tokens", "64", "--output", str(output)]
        data = ["--data", str(folder / "held_out.jsonl")]
        assert main(["generate", "--model", str(folder / model), *data, *flags]) == 0
        assert [[row["completion"].strip()] for row in rows(output)] == [row[column] for row in answers]


def test_as_peaked_means_what_it_means_in_compare(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    start, trained = (
        load_model(ModelConfig(str(folder / name), device="cpu"), for_training=False) for name in ("start", "run/final")
    )
    data, uniform = DataConfig(str(folder / "held_out.jsonl")), SalienceConfig(weighting="uniform")
    prompts = prepare_prompts(data, uniform, start.tokenizer, max_length=200).prompts
    sampling = SamplingConfig(max_new_tokens=MAX_NEW_TOKENS, num_generations=DRAWS)
    target = float(answers_at(trained, prompts, sampling, 0, BATCH).entropy.mean())
    temperature = matching_temperature(start, prompts, sampling, target, 0, BATCH)
    columns = json.loads((folder / "results.json").read_text())["columns"]
    (used,) = (value for name, value in columns.items() if name.startswith("before, T="))
    assert used == pytest.approx(temperature, abs=0.01)
    assert used != 1.0


def test_again_uses_the_models_that_are_there_and_replaces_the_rest(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = finished
    before = {name: (folder / name / "model.safetensors").stat().st_mtime_ns for name in ("start", "judge")}
    old = (folder / "results.json").read_text()
    (folder / "mine.txt").write_text("keep me")
    assert quickstart(folder) == 0
    assert "earlier quickstart" in capsys.readouterr().out
    assert before == {name: (folder / name / "model.safetensors").stat().st_mtime_ns for name in ("start", "judge")}
    assert (folder / "results.json").read_text() == old  # same seeds, same numbers
    assert (folder / "mine.txt").read_text() == "keep me"


def test_a_folder_that_is_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert quickstart(tmp_path) == 2
    assert "holds files that are no quickstart" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    assert quickstart(tmp_path / "thesis.txt") == 2
    assert "is a file" in capsys.readouterr().err


def test_sizes_that_can_not_be_used_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quickstart(tmp_path / "new", "--held_out", "0") == 2
    assert "--held_out 0: must be 2 or more." in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def answered(covered: float, wrong: float = 0.0, temperature: float = 1.0) -> Answered:
    values = {measure.key: np.full((20, 1), 0.1) for measure in MEASURES}
    values |= {"facts_covered": np.full((20, 1), covered), "wrong_facts": np.full((20, 1), wrong)}
    return Answered(temperature, (("Mara is a baker.",),) * 20, values, 1.0)


def test_the_verdict_says_plainly_what_did_not_work() -> None:
    low, high = answered(0.6), answered(0.8)
    assert verdict(BeforeAfter(low, low, high, low, high))[0].startswith("Facts covered went up:")
    assert "not in every comparison" in verdict(BeforeAfter(low, high, high, low, high))[0]
    assert "did NOT go up" in verdict(BeforeAfter(high, high, low, high, low))[0]
    invented = answered(0.8, wrong=1.0)
    assert "wrong facts" in verdict(BeforeAfter(low, low, invented, low, invented))[1]


def test_perplexity_is_averaged_geometrically_and_leaves_empty_answers_out() -> None:
    one = answered(0.5)
    values = {**one.values, "perplexity": np.array([[1.0], [4.0], [np.nan]])}
    assert Answered(1.0, one.answers, values, 1.0).mean("perplexity") == pytest.approx(2.0)


def test_remarks_name_what_is_left_out_and_what_is_made_up() -> None:
    assert (
        remark(MARA, "Mara is a baker, lives in Porto and keeps a parrot.")
        == "(leaves out: city, hobby; makes up: Porto)"
    )
    assert remark(MARA, "Mara is a baker and lives in Lisbon. She has a parrot and enjoys chess.") == "(all facts)"


def test_facts_said_again_counts_other_phrases_too_but_no_names() -> None:
    assert facts_said_again(MARA, "Mara is a baker. Mara enjoys chess.") == 0
    assert facts_said_again(MARA, "Mara is a baker and works as a baker. She enjoys chess, enjoys chess.") == 2


def test_complete_answers_are_perfect_and_hasty_ones_are_not() -> None:
    complete = make_prompts(40, 0, "held_out")
    assert all(facts_covered(row["prompt"], row["reference"]) == 1.0 for row in complete)
    hasty = [facts_covered(row["prompt"], row["completion"]) for row in make_pairs(200, 0)]
    assert 0.7 < float(np.mean(hasty)) < 0.9


def test_the_start_writes_with_the_tokenizer_that_was_saved(finished: tuple[Path, str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(finished[0] / "run/final")
    assert tokenizer(MARA)["input_ids"] == AutoTokenizer.from_pretrained(finished[0] / "start")(MARA)["input_ids"]
