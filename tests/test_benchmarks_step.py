"""The benchmarks of the step run in a tiny setting, and their figures are computed from what was timed."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import growth, memory, ppo_step
from benchmarks.ppo_step import Measured, compare
from benchmarks.systems import trl_ppo
from benchmarks.turns import Step, System
from benchmarks.workload import FIRST_WORD, PAD, STOP, Work, read_prompts, save_start
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = Work("tiny", "tiny", prompt=12, response=8, prompts=2, generations=4, micro_batch=4, epochs=2)
HAS_PPO = pytest.mark.skipif(not trl_ppo.is_installed(), reason=f"needs TRL's PPOTrainer: {trl_ppo.INSTALL}")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The systems are processes of their own, which don't know pytest's import path."""
    root = Path(ppo_step.__file__).parent.parent
    monkeypatch.setenv("PYTHONPATH", f"{root / 'src'}:{root}")


def step(seconds: float, tokens: int, cpu: float = 1.0, idle: float = 100.0, peak: float | None = None) -> Step:
    return Step(seconds, cpu, tokens, {"rollout": seconds}, idle, peak)


def test_ratio_is_the_median_over_rounds_of_steps_per_second():
    # The luck of the tokens does not count: where answers end at random each system draws its own.
    ours = Measured(
        "ours", [step(1.0, 10, cpu=2.0), step(1.0, 40), step(1.0, 30)], step(9.0, 1, idle=100.0, peak=150.0)
    )
    theirs = Measured("theirs", [step(2.0, 90), step(4.0, 10), step(3.0, 30)], step(9.0, 1, idle=200.0, peak=400.0))
    found = compare("case", "ppo", ours, theirs)
    assert (found.slowest, found.speed, found.fastest) == pytest.approx((2.0, 3.0, 4.0))
    # Processor seconds: 2 against 1, then 1 against 1 twice.
    assert found.cpu_speed == 1.0
    assert found.memory == pytest.approx(50 / 200)


def test_no_memory_ratio_where_memory_was_not_measured():
    one = Measured("one", [step(1.0, 10)], None)
    assert compare("case", "ppo", one, one).memory is None


def test_start_stops_at_random_only_where_it_shall(tmp_path: Path):
    # At the size that is measured: eight layers move a coordinate further than two.
    varied = Work("varied", "30M", prompt=40, response=20, prompts=3, varied=True)
    full = dataclasses.replace(TINY, model="30M")
    for folder, work, stop in ((tmp_path / "full", full, 0.0), (tmp_path / "varied", varied, 2 / 20)):
        folder.mkdir()
        save_start(work, folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        encoded = [tokenizer(text)["input_ids"] for text in read_prompts(folder)]
        lengths = [len(ids) for ids in encoded]
        assert lengths == ([40 // 2, 30, 40] if work.varied else [12, 12])
        assert min(min(ids) for ids in encoded) >= FIRST_WORD
        with torch.no_grad():
            likely = model(input_ids=torch.tensor(encoded[-1])[None]).logits[0].softmax(dim=-1)
        assert float(likely[:, PAD].max()) < 1e-9
        assert torch.allclose(likely[:, STOP], torch.tensor(stop), rtol=0.6, atol=1e-9)


def check_steps(found: dict[str, Any], work: Work, systems: int) -> None:
    """All systems did the work, and their stages make up their steps."""
    assert len(found) == systems
    for one in found.values():
        for taken in one["steps"]:
            assert work.sequences <= taken["tokens"] <= work.sequences * work.response
            assert all(taken["stages"][stage] > 0 for stage in ppo_step.STAGES)
            assert sum(taken["stages"].values()) <= taken["seconds"]
            assert (
                0 < taken["cpu_seconds"] <= 1.1 * taken["seconds"]
            )  # one thread, and one of autograd that takes its place
        if memory.can_measure():
            assert one["memory"]["peak_mebibytes"] > one["memory"]["idle_mebibytes"] > 0


@pytest.mark.parametrize("pair", [pytest.param("ppo", marks=HAS_PPO), "grpo"])
def test_steps_in_turn_and_writes_what_was_timed(pair: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ppo_step, "cases", lambda size, vocabulary: [TINY])
    out = tmp_path / "step.json"
    assert ppo_step.main(["--tiny", "--rounds", "1", "--threads", "1", "--pairs", pair, "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    systems = written["cases"][0]["systems"]
    check_steps(systems, TINY, systems=2)
    speeds = {name: one["steps"][0]["tokens"] / one["steps"][0]["seconds"] for name, one in systems.items()}
    ours, theirs = (speeds[name] for name in systems)
    assert written["ratios"][0]["speed"] == pytest.approx(ours / theirs)
    assert [name.split()[0] for name in systems] == ["cagsr", "TRL"]


def test_says_how_to_get_the_trainer_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(trl_ppo, "FOLDER", tmp_path)
    with pytest.raises(SystemExit) as error:
        ppo_step.main(["--tiny", "--pairs", "ppo"])
    assert error.value.code == 2
    assert trl_ppo.INSTALL in " ".join(capsys.readouterr().err.split())


def test_make_bench_installs_the_version_that_is_named():
    makefile = Path(ppo_step.__file__).parent.parent / "Makefile"
    assert f" trl=={trl_ppo.VERSION})\n" in makefile.read_text()


def test_refuses_to_compare_unequal_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    system = object.__new__(System)
    system.module, system._work = "one", TINY
    monkeypatch.setattr(system, "_tell", lambda command: None)
    monkeypatch.setattr(system, "_expect", lambda: json.dumps(dataclasses.asdict(step(1.0, 63))))
    with pytest.raises(RuntimeError, match="63 tokens where the work is 64"):
        system.step()
    monkeypatch.setattr(system, "_expect", lambda: json.dumps(dataclasses.asdict(step(1.0, 64))))
    assert system.step().tokens == 64


def test_a_system_that_fails_says_why(tmp_path: Path):
    with pytest.raises(RuntimeError, match="no_such_system"):
        System("no_such_system", TINY, tmp_path, 1)


def test_growth_writes_what_was_timed_and_draws_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(growth, "axes", lambda tiny, longest: [growth.Axis("batch", "answers", [(8, TINY)])])
    out, figure = tmp_path / "growth.json", tmp_path / "growth.png"
    assert growth.main(["--tiny", "--threads", "1", "--json", str(out), "--figure", str(figure)]) == 0
    (point,) = json.loads(out.read_text())["points"]
    assert (point["size"], point["tokens"]) == (8, TINY.sequences * TINY.response)
    parts = sum(point["stages"].values())
    assert 0.8 * point["seconds"] < parts <= 1.25 * point["seconds"]  # medians of two steps each
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_exponent_is_the_power_of_a_power_law():
    work = Work("w")
    points = [growth.Point("a", size, 3.0 * size**1.5, {}, 1, 7.0 * size, work) for size in (2, 4, 16)]
    assert growth.exponent(points, "seconds") == pytest.approx(1.5)
    assert growth.exponent(points, "mebibytes") == pytest.approx(1.0)
    assert growth.exponent(points[:1], "seconds") is None


def test_every_axis_grows_one_thing_only():
    for axis in growth.axes(tiny=False, longest=32768):
        works = [work for _, work in axis.works]
        fields = {name for work in works for name in vars(work) if getattr(work, name) != getattr(works[0], name)}
        assert len(fields) == 1, axis.name
        assert len(works) == len({getattr(work, next(iter(fields))) for work in works})
    lengths = [size for size, _ in growth.axes(tiny=False, longest=32768)[0].works]
    assert (lengths[0], lengths[-1]) == (256, 32768)
    assert statistics.median(lengths) > 1024
