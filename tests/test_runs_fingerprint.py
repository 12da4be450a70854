"""A resumed training goes on with the data and the models it began with, or says in one sentence what has changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import cagsr.runs.trl_training as trl_training
import tiny
from cagsr.commands.main import main
from cagsr.config import DataConfig
from cagsr.errors import RunError
from cagsr.runs.fingerprint import (
    FINGERPRINT,
    check_fingerprint,
    fingerprint_path,
    fingerprint_rows,
    write_fingerprint,
)


def write(path: Path, *prompts: str) -> Path:
    path.write_text("".join(json.dumps({"prompt": text, "completion": "the cat ."}) + "\n" for text in prompts))
    return path


def test_rows_that_are_not_read_may_change(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", "a", "b")
    limited, streamed = DataConfig(path=str(file), limit=2), DataConfig(path=str(file), streaming=True)
    before = fingerprint_rows(limited), fingerprint_rows(streamed)
    write(file, "a", "b", "c")
    assert (fingerprint_rows(limited) == before[0], fingerprint_rows(streamed) == before[1]) == (True, False)
    write(file, "a", "c")
    assert fingerprint_rows(limited) != before[0]


def test_a_change_is_named_and_what_can_not_be_told_is_said(tmp_path: Path) -> None:
    assert check_fingerprint(tmp_path, {"data.path p": "1"}, "The run") == [
        "Whether data and models are those it began with can't be told: it was begun by an older version."
    ]
    write_fingerprint(tmp_path, {"data.path p": "1", "model.path m": "2", "reward.models r": None})
    same = {"data.path p": "1", "model.path m": "2", "reward.models r": "3"}
    assert check_fingerprint(tmp_path, same, "The run") == [
        "Whether reward.models r is what it was when the run began can't be told."
    ]
    with pytest.raises(
        RunError, match=r"^The run can't be resumed because other .* lie at data\.path p, model\.path m;"
    ):
        check_fingerprint(tmp_path, {"data.path p": "x", "model.path m": "y"}, "The run")
    (tmp_path / FINGERPRINT).write_text("{")
    with pytest.raises(RunError, match="can't be read"):
        check_fingerprint(tmp_path, same, "The run")


def test_a_path_is_a_file_a_folder_or_nothing(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    file = write(tmp_path / "data" / "p.jsonl", "a")
    first = fingerprint_path(str(file)), fingerprint_path(str(file.parent))
    write(file, "b")
    second = fingerprint_path(str(file)), fingerprint_path(str(file.parent))
    assert None not in (*first, *second)
    assert len({*first, *second}) == 4
    assert fingerprint_path("org/dataset") is None


def test_a_run_whose_prompts_or_start_changed_does_not_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, data, run = tiny.save_model(tmp_path / "start"), tiny.save_prompts(tmp_path / "p.jsonl"), tmp_path / "run"
    small = "--run.batch_size 2 --num_generations 2 --max_new_tokens 3 --evaluation.held_out 2 --run.save_every 1"
    argv = ["train", "--model", str(start), "--data", str(data), "--output_dir", str(run), *small.split()]
    assert main([*argv, "--steps", "1"]) == 0
    log = (run / "metrics.jsonl").read_text()
    prompts, weights = data.read_text(), load_file(start / "model.safetensors")

    # the same rows in another order hold other prompts out
    data.write_text("".join(line + "\n" for line in reversed(prompts.splitlines())))
    changed = {name: value * 1.001 for name, value in weights.items()}
    for name, part in (("data.path", str(data)), ("model.path", str(start))):
        if name == "model.path":
            data.write_text(prompts)
            save_file(changed, start / "model.safetensors", metadata={"format": "pt"})
        capsys.readouterr()
        assert main([*argv, "--steps", "2", "--resume"]) == 2
        assert (
            f"can't be resumed because other contents than when it began lie at {name} {part};"
            in capsys.readouterr().err
        )
        assert (run / "metrics.jsonl").read_text() == log

    # a run of an older version has no fingerprint: it goes on, says so, and has one from now on
    (run / FINGERPRINT).unlink()
    assert main([*argv, "--steps", "2", "--resume"]) == 0
    assert "it was begun by an older version" in capsys.readouterr().out
    save_file(weights, start / "model.safetensors", metadata={"format": "pt"})
    assert main([*argv, "--steps", "3", "--resume"]) == 2


@pytest.mark.parametrize("command", ["sft", "dpo", "reward-model"])
def test_a_trainers_training_whose_pairs_changed_does_not_go_on(
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start, out, data = tiny.save_model(tmp_path / "start", scale=1.0), tmp_path / "out", tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"the {animal}", "completion": "likes food .", "chosen": "likes food .", "rejected": "sees ."}
        for animal in ("cat", "dog", "bird", "tree")
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [command, "--model", str(start), "--data", str(data), "--output_dir", str(out), "--batch_size", "2"]
    argv += ["--save_every", "1", *(["--held_out", "0"] if command == "reward-model" else [])]

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trl_training, "save_trained", killed)
    assert main([*argv, "--steps", "1"]) == 130
    monkeypatch.undo()
    kept = data.read_text()
    data.write_text(kept.replace("bird", "house"))
    assert main([*argv, "--steps", "2", "--resume"]) == 2
    assert f"The {command} in {out} can't be resumed because other contents" in capsys.readouterr().err
    assert main([*argv, "--steps", "2", "--resume", "--save_every", "0"]) == 2  # not to be got round so
    data.write_text(kept)
    assert main([*argv, "--steps", "2", "--resume"]) == 0
    assert not (out / "checkpoints").exists()
