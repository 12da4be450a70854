"""``python -m benchmarks.gpu`` where there is no GPU: a dry run, what is left out and named, what is kept when a part fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import bare_checkout
from benchmarks.gpu import parts
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.parts import Part, run_apart
from benchmarks.gpu.sampling_speed import _bytes_per_step
from benchmarks.gpu.setting import Setting, random_model


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")  # put back afterwards: main sets it for its children


def run(folder: Path, *more: str) -> tuple[int, dict[str, Any], str]:
    code = main(["--dry_run", "--json", str(folder / "gpu.json"), *more])
    assert sorted(path.name for path in folder.iterdir()) == ["gpu.json", "gpu.md"]  # nothing under a temporary name
    return code, json.loads((folder / "gpu.json").read_text()), (folder / "gpu.md").read_text()


def test_a_dry_run_measures_all_that_one_process_can(tmp_path: Path) -> None:
    code, report, table = run(tmp_path, "--only", "capture", "sampling", "lora")
    assert code == 0
    assert [(part["name"], part["state"]) for part in report["parts"]] == [
        (name, "finished") for name in ("capture", "sampling", "lora")
    ]
    capture, sampling, lora = (part["rows"] for part in report["parts"])
    found = {row["measured"]: row["figures"] for row in capture}
    assert found["2 x (12+6): kernel"] == {"left out": "no Triton on a CPU"}
    assert found["2 x (12+6): eager against reference"]["largest difference"] < 1e-6
    assert found["2 x (12+6): plain forward"]["of plain"] == 1.0
    assert sampling[1]["figures"]["share"] == pytest.approx(
        sampling[1]["figures"]["tokens/s"] / sampling[1]["figures"]["limit by bandwidth"]
    )
    assert lora[0]["figures"]["s"] == pytest.approx(
        lora[0]["figures"]["s, rollout and scoring"] + lora[0]["figures"]["s, update"]
    )
    assert "| A LoRA step at 7B | tiny, LoRA rank 16" in table
    assert "whose figures mean nothing" in table


def test_what_is_missing_or_comes_too_late_is_left_out_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = Part("x", "nothing", "Needs more", 5, ("torch", "no_such_module"))
    monkeypatch.setattr(parts, "PARTS", (absent, parts.PARTS[1]))
    code, report, table = run(tmp_path, "--minutes", "0")
    assert code == 0
    assert [(part["state"], part["reason"]) for part in report["parts"]] == [
        ("left out", "no_such_module not installed"),
        ("left out", "no time was left of --minutes 0"),
    ]
    assert "| Needs more | **left out** | no_such_module not installed |" in table
    assert "left out: no_such_module not installed" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_nothing_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", str(tmp_path / "gpu.json")]) == 2
    assert "There is no CUDA GPU here; --dry_run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_part_that_fails_or_hangs_says_so_and_ends() -> None:
    assert run_apart([sys.executable, "-c", "print('so far'); raise SystemExit('no memory')"], 60) == (
        "failed",
        "no memory",
    )
    hangs = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    assert run_apart([sys.executable, "-c", hangs], 0.5) == ("out of time", "it had 0 s")
    assert run_apart([sys.executable, "-c", "pass"], 60) == ("finished", "")


def test_rows_are_kept_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaks:
        @staticmethod
        def measure(setting: Setting, keep: Any) -> None:
            keep("first", {"s": 1.0})
            raise RuntimeError("out of memory")

    monkeypatch.setitem(sys.modules, "benchmarks.gpu.breaks", Breaks)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError):
        parts.run_here(Part("x", "breaks", "Breaks", 5), Setting(dry_run=True), tmp_path / "x.json")
    assert parts.rows_of(tmp_path / "x.json") == [{"measured": "first", "figures": {"s": 1.0}}]


def test_a_token_reads_the_weights_and_its_rows_caches() -> None:
    model = random_model(Setting(dry_run=True), "tiny", 32)
    weights = 4 * sum(
        one.numel() for one in model.parameters()
    )  # float32; the tied embedding is the head, and read whole
    cache = 2 * 4 * 2 * 8 * 4  # keys and values, layers, key-value heads, width, bytes
    assert _bytes_per_step(model, 3, 10) == weights + 3 * 10 * cache


def test_older_packages_are_said_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.11.0+cu130", "transformers": "99.0.0"}
    monkeypatch.setattr(bare_checkout, "version", lambda name: installed[name])
    [older] = bare_checkout.older_than_ours(("torch", "transformers"))
    assert older.startswith("torch 2.11.0+cu130 is older than 2.")


def test_from_a_bare_checkout_settings_need_no_package_that_checks_them() -> None:
    code = (
        "import sys; sys.modules['pydantic'] = sys.modules['annotated_types'] = None\n"
        "from benchmarks.bare_checkout import prepare\n"
        "print(*prepare())\n"
        "from cagsr.config import PPOConfig, RewardConfig, validate\n"
        "validate(RewardConfig(), 'reward.'); print(PPOConfig(micro_batch_size=3).micro_batch_size)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=bare_checkout.ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == (
        "annotated_types and pydantic not installed: settings are taken as they are, unchecked.\n3\n"
    )
