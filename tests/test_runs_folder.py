"""The run folder: who may write it, what it refuses, how its logs are cut back."""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cagsr.errors import ConfigError, RunError
from cagsr.runs.checkpoint import CheckpointState, save_checkpoint
from cagsr.runs.folder import RunFolder, differing_keys
from cagsr.runs.lines import append_lines, read_lines, truncate_lines
from cagsr.support import atomic

CONFIG = "output_dir: a\nppo:\n  kl_coef: 0.05\n  lr_scheduler: linear\nrun:\n  steps: 10\n  seed: 0\n"


def started(path: Path, steps: int = 0, checkpoint: int | None = None) -> None:
    """A run that did some steps, closed."""
    with RunFolder.open(path, CONFIG, resume=False, overwrite=False) as folder:
        for step in range(1, steps + 1):
            folder.append("metrics", step, {"loss": 1 / step})
            folder.append("samples", step, {"completion": "a"}, {"completion": "b"})
            if step == checkpoint:
                folder.sync_logs()
                save_checkpoint(folder.checkpoints, step, CheckpointState(), keep=1)


def test_a_new_run_writes_its_config_and_empty_logs(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "deep" / "run", CONFIG, resume=False, overwrite=False) as folder:
        assert (folder.path / "config.yaml").read_text() == CONFIG
        assert folder.metrics.read_text() == ""
        assert (folder.checkpoint, folder.step, folder.notes) == (None, 0, ())


def test_another_run_is_refused_and_nothing_of_it_touched(tmp_path: Path) -> None:
    started(tmp_path / "run", steps=3, checkpoint=2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "run.lock"}
    with pytest.raises(RunError) as raised:
        RunFolder.open(tmp_path / "run", CONFIG, resume=False, overwrite=False)
    assert str(tmp_path / "run") in str(raised.value)
    assert "--run.resume True" in str(raised.value)
    assert "--run.overwrite True" in str(raised.value)
    assert {path: path.read_bytes() for path in before} == before
    RunFolder.open(tmp_path / "run", CONFIG, resume=True, overwrite=False).close()  # and the lock was let go


@pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True)])
def test_a_folder_that_is_no_run_is_always_refused(tmp_path: Path, flags: tuple[bool, bool]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="not a cagsr run"):
        RunFolder.open(tmp_path, CONFIG, resume=flags[0], overwrite=flags[1])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(RunError, match="is a file"):
        RunFolder.open(tmp_path / "out", CONFIG, resume=False, overwrite=False)


def test_overwrite_removes_the_run_and_only_the_run(tmp_path: Path) -> None:
    started(tmp_path, steps=3, checkpoint=2)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "final").mkdir()
    with RunFolder.open(tmp_path, CONFIG, resume=False, overwrite=True) as folder:
        assert folder.metrics.read_text() == ""
        assert not folder.checkpoints.exists()
        assert not (tmp_path / "final").exists()
        assert (tmp_path / "notes.txt").read_text() == "mine"


def test_resume_and_overwrite_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        RunFolder.open(tmp_path, CONFIG, resume=True, overwrite=True)


def test_resume_goes_back_to_the_checkpoint(tmp_path: Path) -> None:
    started(tmp_path, steps=5, checkpoint=3)
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 6, "lo')  # killed while writing
    with RunFolder.open(tmp_path, CONFIG, resume=True, overwrite=False) as folder:
        assert folder.step == 3
        assert folder.checkpoint == tmp_path / "checkpoints" / "step-000003"
        assert [row["step"] for row in read_lines(folder.metrics)] == [1, 2, 3]
        assert [row["step"] for row in read_lines(tmp_path / "samples.jsonl")] == [1, 1, 2, 2, 3, 3]
        folder.append("metrics", 4, {"loss": 0.25})
        assert read_lines(folder.metrics)[-1] == {"step": 4, "loss": 0.25}


def test_resume_without_a_checkpoint_starts_from_the_beginning_and_says_so(tmp_path: Path) -> None:
    started(tmp_path, steps=2)
    with RunFolder.open(tmp_path, CONFIG, resume=True, overwrite=False) as folder:
        assert (folder.checkpoint, folder.step) == (None, 0)
        assert "starting from the beginning" in folder.notes[-1]
        assert folder.metrics.read_text() == ""
    with RunFolder.open(tmp_path / "new", CONFIG, resume=True, overwrite=False) as folder:
        assert "no run" in folder.notes[0]


def test_resume_with_other_settings_names_them(tmp_path: Path) -> None:
    started(tmp_path, steps=2, checkpoint=2)
    changed = CONFIG.replace("0.05", "0.5").replace("seed: 0", "seed: 1")
    with pytest.raises(RunError, match=r"other values of ppo\.kl_coef, run\.seed:"):
        RunFolder.open(tmp_path, changed, resume=True, overwrite=False)
    assert (tmp_path / "config.yaml").read_text() == CONFIG
    longer = CONFIG.replace("steps: 10", "steps: 20").replace("output_dir: a", "output_dir: b")
    with RunFolder.open(tmp_path, longer, resume=True, overwrite=False) as folder:
        assert (tmp_path / "config.yaml").read_text() == longer
        assert any("run.steps was 10 and is 20" in note for note in folder.notes)  # the learning rate decays


def test_differing_keys() -> None:
    assert differing_keys("a: {b: 1, c: [1]}", "a: {b: 1, c: [2], d: 3}") == ["a.c", "a.d"]
    assert differing_keys("monitors: {kl: 1}\nmodel: {device: cpu}", "monitors: {kl: 2}\nmodel: {device: cuda}") == []
    assert differing_keys("ppo: {}", "ppo: {}") == []
    # An older version's file lacks a newer setting: it ran with what is the default now.
    assert differing_keys("ppo: {gamma: 1.0}", "ppo: {gamma: 1.0, lam: 0.95, vf_coef: 0.2}") == ["ppo.vf_coef"]


def test_a_run_without_config_but_with_checkpoints_is_not_thrown_away(tmp_path: Path) -> None:
    started(tmp_path, steps=2, checkpoint=2)
    (tmp_path / "config.yaml").unlink()
    for resume in (False, True):
        with pytest.raises(RunError):
            RunFolder.open(tmp_path, CONFIG, resume=resume, overwrite=False)
    assert (tmp_path / "checkpoints" / "step-000002").exists()


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, CONFIG, resume=False, overwrite=False) as folder:
        folder.append("metrics", 1, {})
        for flags in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
            with pytest.raises(RunError, match=f"another process .number {os.getpid()}."):
                RunFolder.open(tmp_path, CONFIG, **flags)
        assert len(read_lines(folder.metrics)) == 1


def test_leftovers_of_a_kill_are_mended(tmp_path: Path) -> None:
    started(tmp_path, steps=2, checkpoint=2)
    checkpoints = tmp_path / "checkpoints"
    os.replace(checkpoints / "step-000002", checkpoints / ".step-000002.cagsr-old")  # killed between two renames
    (checkpoints / ".step-000003.cagsr-tmp").mkdir()
    (tmp_path / ".config.yaml.cagsr-tmp").write_text("outp")
    with RunFolder.open(tmp_path, CONFIG, resume=True, overwrite=False) as folder:
        assert folder.step == 2
    assert [path.name for path in checkpoints.iterdir()] == ["step-000002"]
    assert not (tmp_path / ".config.yaml.cagsr-tmp").exists()


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=5))
def test_floats_round_trip_exactly(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    path = tmp_path_factory.mktemp("lines") / "metrics.jsonl"
    append_lines(path, [{"step": 1, "value": value} for value in values])
    assert [row["value"] for row in read_lines(path)] == values


def test_values_of_other_kinds_stay_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    third = torch.tensor(1 / 3)
    append_lines(path, [{"step": 1, "a": third, "b": math.nan, "c": -math.inf, "d": torch.tensor([1, 2]), "e": "ü\n"}])

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    row = read_lines(path)[0]
    assert row == {"step": 1, "a": third.item(), "b": None, "c": -math.inf, "d": [1, 2], "e": "ü\n"}


def test_truncation_drops_half_lines_also_in_the_middle_of_a_character(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    append_lines(path, [{"step": step, "text": "grüße"} for step in (1, 2)])
    whole = path.read_bytes()
    for cut in range(len(whole) // 2 + 1, len(whole)):
        path.write_bytes(whole[:cut])
        assert truncate_lines(path, 2) == 0
        assert [row["step"] for row in read_lines(path)] == [1]
    path.write_bytes(whole + b"\0\0\0\n\0\n")  # what a power cut may leave
    assert truncate_lines(path, 2) == 0
    assert path.read_bytes() == whole


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(RunError, match=r"log\.jsonl, line 2 is not a JSON object"):
        truncate_lines(path, 5)
    path.write_text('{"step": 1}\n{"loss": 2}\n')
    with pytest.raises(RunError, match="line 2 has no step"):
        truncate_lines(path, 5)


def test_a_full_disk_is_one_sentence_and_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(RunError) as raised:
        atomic.write_text_atomically(path, "new")
    assert str(raised.value).startswith(f"{path} can't be written because the disk is full")
    with pytest.raises(RunError, match="disk is full"), atomic.replace_folder(tmp_path / "final") as temporary:
        (temporary / "model").write_text("x")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


def test_torch_saying_that_the_disk_is_full_is_one_sentence_and_its_other_errors_are_themselves(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="disk is full") as raised, atomic.disk_errors(tmp_path):
        torch.save(torch.zeros(1000), "/dev/full")
    assert "--run.resume" not in str(raised.value)  # sft, dpo and reward-model have no such flag
    (tmp_path / "optimizer.pt").write_bytes(b"PK\x03\x04 half of it")
    with pytest.raises(RuntimeError, match="PytorchStreamReader"), atomic.disk_errors(tmp_path):
        torch.load(tmp_path / "optimizer.pt")


def test_links_and_devices_are_written_through_and_stay(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("old")
    links = {
        "rows": tmp_path / "data" / "rows.jsonl",
        "new": tmp_path / "data" / "new.jsonl",
        "null": Path("/dev/null"),
    }
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
        atomic.write_text_atomically(tmp_path / name, name)
        assert (tmp_path / name).is_symlink()
    assert {path.name: path.read_text() for path in (tmp_path / "data").iterdir()} == {
        "rows.jsonl": "rows",
        "new.jsonl": "new",
    }
    pipe, got = tmp_path / "pipe", list[str]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()), daemon=True)
    reader.start()
    atomic.write_text_atomically(pipe, "through")
    reader.join(timeout=10)
    assert got == ["through"]
    assert pipe.is_fifo()


def test_linked_folders_are_unlinked_and_never_emptied(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    started(run, steps=2, checkpoint=2)
    os.replace(run / "checkpoints", elsewhere)
    (run / "checkpoints").symlink_to(elsewhere)
    (run / "final").symlink_to(tmp_path / "nowhere")
    (run / ".final-adapter.cagsr-tmp").symlink_to(elsewhere)  # what an older version left, and could not delete
    with RunFolder.open(run, CONFIG, resume=False, overwrite=True) as folder:
        assert not folder.checkpoints.exists()
    (run / "final").symlink_to(elsewhere)
    with atomic.replace_folder(run / "final") as temporary:
        (temporary / "model").write_text("new")
    assert [entry.name for entry in (run / "final").iterdir()] == ["model"]
    assert not any(path.is_symlink() for path in run.iterdir())
    assert [entry.name for entry in elsewhere.iterdir()] == ["step-000002"]


def test_a_failed_block_leaves_the_old_folder(tmp_path: Path) -> None:
    with atomic.replace_folder(tmp_path / "final") as temporary:
        (temporary / "model").write_text("old")
    with pytest.raises(KeyError), atomic.replace_folder(tmp_path / "final") as temporary:
        (temporary / "model").write_text({}["a bug while saving"])
    assert (tmp_path / "final" / "model").read_text() == "old"
    with atomic.replace_folder(tmp_path / "final") as temporary:
        (temporary / "weights").write_text("new")
    assert [entry.name for entry in (tmp_path / "final").iterdir()] == ["weights"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["final"]
