"""When a training begins, pauses and ends, with programs that stand for it; what goes on from an adapter."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import tiny
from cagsr.config import LoraConfig, ModelConfig
from cagsr.errors import ConfigError, MonitorStop
from cagsr.models.load import go_on_from, load_model
from cagsr.runs.checkpoint import Latest
from cagsr.serving import work
from cagsr.serving.activity import Activity
from cagsr.serving.job import Job, JobFolder
from cagsr.serving.learner import Learner
from cagsr.serving.prompt_store import PromptStore
from cagsr.serving.settings import ConsentConfig, LearningConfig, ServeConfig
from cagsr.serving.training_process import heed_interrupts
from cagsr.serving.versions import Versions

HELD_OUT = [{"prompt": f"held out {number}"} for number in range(4)]


@pytest.fixture
def learner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A learner with two kept prompts, whose training is a program that sleeps; nothing looks by itself."""
    program = tmp_path / "sleeps"
    # Whoever runs the tests in the background has SIGINT ignored by all that he starts; a training's process is not.
    program.write_text(
        f"#!{sys.executable} -IS\nimport pathlib, signal, time\nsignal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\ntime.sleep(60)\n"
    )
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    store = PromptStore(tmp_path / "p.sqlite", ConsentConfig(), hold_out=False)
    made: list[Learner] = []

    def make(**learning: Any) -> Learner:
        given = {"idle_seconds": 0.0, "new_prompts": 2, **learning}
        config = ServeConfig(learning=LearningConfig(**given))
        made.append(Learner(config, tmp_path, store, Versions(tmp_path), Activity(), HELD_OUT))
        return made[0]

    for text in ("one", "two"):
        store.keep(text)
    yield make
    made[0].close()
    store.close()


def _until(learner: Learner, done: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end, learner.status()
        learner._look()
        time.sleep(0.01)


def test_a_training_waits_for_prompts_and_for_idle_time(learner: Any) -> None:
    waiting = learner(new_prompts=3, idle_seconds=0.2)
    _until(waiting, lambda: waiting.status()["for"] == "1 more prompts")
    waiting._store.keep("three")
    with waiting._activity:
        time.sleep(0.3)
        waiting._look()
        assert waiting.status()["state"] == "waiting"
    waiting._look()
    assert waiting.status()["state"] == "waiting"  # somebody was answered just now
    _until(waiting, lambda: waiting.status()["state"] == "training")
    assert waiting._job.job() == Job(number=1, parent=0, trained=3, removed=0)
    assert waiting._job.held_out.read_text().count("held out") == 4
    assert waiting._job.path.stat().st_mode & 0o077 == 0


def test_a_training_stands_still_while_somebody_is_answered(learner: Any) -> None:
    pausing = learner(idle_seconds=0.1)
    _until(pausing, lambda: pausing.status()["state"] == "training")
    process = psutil.Process(pausing._process.pid)
    assert process.nice() == min(19, psutil.Process().nice() + 10)
    with pausing._activity:
        _until(pausing, lambda: process.status() == psutil.STATUS_STOPPED)
        assert pausing.status()["state"] == "paused"
        worked = pausing._worked
        time.sleep(0.1)
        pausing._look()
        assert pausing._worked == worked  # pauses don't count
    _until(pausing, lambda: process.status() != psutil.STATUS_STOPPED)


@pytest.mark.parametrize(
    ("budget", "told"),
    [({"memory_mb": 1}, "It took more than 1 MiB"), ({"seconds": 900.0}, "The training ended with status -2")],
    ids=["memory", "seconds"],
)
def test_a_training_is_held_to_its_budget(budget: dict[str, Any], told: str, learner: Any, tmp_path: Path) -> None:
    spending = learner(**budget)
    spending._look()
    process = psutil.Process(spending._process.pid)
    if "seconds" in budget:
        _until(spending, (tmp_path / "ready").exists)
        spending._worked += 900.0
    _until(spending, lambda: spending._process is None)
    assert not process.is_running()
    assert told in spending.status()["last"]["failed"]  # SIGINT, at which this program ends
    assert not spending._job.path.exists()
    assert spending._versions.manifest().trained == 2  # the next one waits for new prompts
    spending._rests_until = 0.0
    spending._look()
    assert spending.status()["for"] == "2 more prompts"


def test_a_server_in_the_background_can_say_that_the_time_is_up() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what it starts with &
    try:
        heed_interrupts()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_training_that_a_server_left_is_gone_on_with_unless_a_prompt_is_gone(learner: Any, tmp_path: Path) -> None:
    going = learner()
    place = JobFolder(tmp_path / "training")
    place.begin(Job(1, 0, 2, 0), ServeConfig(), going._store.prompts(), HELD_OUT)
    assert place.config() == ServeConfig()
    _until(going, lambda: going.status()["state"] == "training")
    process = psutil.Process(going._process.pid)
    going._store.remove(1)
    going._look()
    assert not process.is_running()
    assert not place.path.exists()


def test_what_was_trained_when_the_time_was_up_is_finished(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    training = JobFolder(tmp_path).training(Job(1, 0, 2, 0), ServeConfig(), None)
    assert (training.run.resume, training.lora.r, training.lora.start) == (True, 16, None)
    assert (training.monitors.kl, training.monitors.kl_action) == (10.0, "stop")
    steps: list[int] = []

    def interrupted(config: Any) -> None:
        steps.append(config.run.steps)
        if len(steps) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(work.signal, "signal", lambda *given: None)
    monkeypatch.setattr(work, "train", interrupted)
    monkeypatch.setattr(work, "latest_checkpoint", lambda folder: Latest(folder, 6, ()))
    assert work._train(training) == []
    assert steps == [20, 6]
    monkeypatch.setattr(work, "latest_checkpoint", lambda folder: Latest(None, 0, ()))
    steps.clear()
    assert work._train(training) == ["The time was up before a step was done (--learning.seconds)."]

    def stopped(config: Any) -> None:
        raise MonitorStop("step 3: The KL is 12. The checkpoint x is intact; go on from it with --resume.")

    monkeypatch.setattr(work, "train", stopped)
    assert work._train(training) == ["A monitor stopped the training: step 3: The KL is 12."]


def test_training_goes_on_from_an_adapter(tmp_path: Path) -> None:
    model, lora = ModelConfig(str(tiny.save_model(tmp_path / "model")), device="cpu"), LoraConfig(r=4)
    trained = load_model(model, lora).model
    with torch.no_grad():
        for name, weight in trained.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    trained.save_pretrained(str(tmp_path / "adapter"))
    again = load_model(model, lora).model
    ids = torch.arange(3, 9)[None]
    before = again(ids).logits
    go_on_from(again, str(tmp_path / "adapter"))
    torch.testing.assert_close(again(ids).logits, trained(ids).logits)
    assert not torch.allclose(before, trained(ids).logits)
    assert any(weight.requires_grad for weight in again.parameters())
    for other in (replace(lora, r=2), replace(lora, alpha=8), replace(lora, target_modules="q_proj")):
        with pytest.raises(ConfigError, match="another rank or scale, or other modules"):
            go_on_from(load_model(model, other).model, str(tmp_path / "adapter"))
    with pytest.raises(ConfigError, match=r"there is no adapter_model\.safetensors"):
        go_on_from(again, str(tmp_path / "model"))
