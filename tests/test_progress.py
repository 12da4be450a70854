"""Where long work is: a line at least every so many seconds however long a unit takes, in every command, and how it ends."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import tiny
from cagsr.commands.main import main
from cagsr.compare import scheduler
from cagsr.compare.jobs import Job
from cagsr.support import progress
from cagsr.support.progress import Display, duration, each, resting, say, shown, working
from slow import every_pass_is_long

# ---- the mechanism ----


@dataclass
class Time:
    """A clock that is set by hand."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Shown:
    """A display on a stream, its clock set by hand and its thread asleep: ``at`` looks at the clock as the thread does."""

    display: Display
    stream: io.StringIO
    time: Time

    def at(self, second: float) -> list[str]:
        """The lines printed since the last call, the clock set to so many seconds after the beginning."""
        self.time.now = 100.0 + second
        self.display.tick()
        lines = self.stream.getvalue().splitlines()
        self.stream.seek(0)
        self.stream.truncate()
        return lines


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shown]:
    stream, clock = io.StringIO(), Time()
    monkeypatch.setattr(Display, "_watch", lambda self: None)
    with Display("cagsr test", Console(file=stream, soft_wrap=True), clock=clock) as display:
        before = progress._CURRENT.set(display)
        yield Shown(display, stream, clock)
        progress._CURRENT.reset(before)


def test_the_promise_is_half_a_minute() -> None:
    assert progress.FIRST <= 30
    assert progress.EVERY + progress._POLL < 30


def test_a_unit_that_takes_minutes_gives_lines_by_the_clock(plain: Shown) -> None:
    with working("scoring", 8, "batches") as task:
        task.advance(2)
        assert plain.at(9.9) == []
        assert plain.at(10) == ["scoring 2/8 batches (0:10, 0:30 left)"]
        assert plain.at(34) == []
        assert plain.at(35) == ["scoring 2/8 batches (0:35, 1:45 left)"]
        assert plain.at(95) == ["scoring 2/8 batches (1:35, 4:45 left)"]  # one, however late the thread wakes


def test_what_it_is_part_of_comes_first_and_numbers_stand_beside(plain: Shown) -> None:
    with working("step", 100, done=40) as step:
        plain.time.now += 60
        step.advance()
        step.note = "reward 0.5"
        with working("saving"):
            # 41 of 100: the 40 of before took none of this minute
            assert plain.at(60) == ["step 41/100 (1:00, 59:00 left)  reward 0.5 > saving (0:00)"]
        for number in each("judging", [1, 2, 3]):
            if number == 2:
                assert plain.at(90) == ["step 41/100 (1:30, 1:28:30 left)  reward 0.5 > judging 1/3 (0:30, 1:00 left)"]
    assert plain.at(200) == ["cagsr test (3:20)"]  # nothing is known but that it goes on


def test_functions_can_be_marked_and_failures_leave_nothing_behind(plain: Shown) -> None:
    @working("reading")
    def read() -> None:
        assert plain.at(20) == ["reading (0:20)"]
        for _ in each("row", [1]):
            raise ValueError("bad row")

    # The exception holds the generator of each(): its task must be gone all the same.
    with pytest.raises(ValueError, match="bad row") as caught:
        read()
    assert caught.value.args == ("bad row",)
    assert plain.at(60) == ["cagsr test (1:00)"]


def test_nothing_is_said_while_resting_and_nobody_listening_is_no_failure(plain: Shown) -> None:
    with resting(), working("serving"):
        assert plain.at(500) == []
    assert plain.at(501) == ["cagsr test (8:21)"]
    plain.stream.close()
    plain.time.now += 100
    plain.display.tick()  # as a pipe whose reader has left


def test_durations_are_written_as_clocks_show_them() -> None:
    assert [duration(seconds) for seconds in (0.4, 59.6, 3599, 3723)] == ["0:00", "1:00", "59:59", "1:02:03"]


def test_a_thread_keeps_the_promise_while_one_unit_goes_on_and_says_nothing_afterwards() -> None:
    stream = io.StringIO()
    with Display("x", Console(file=stream), first=0.05, every=0.05) as display:
        before = progress._CURRENT.set(display)
        with working("saving the model"):
            deadline = time.monotonic() + 10
            while stream.getvalue().count("\n") < 3 and time.monotonic() < deadline:
                time.sleep(0.01)  # one unit: nothing tells the display that time has passed
        progress._CURRENT.reset(before)
    said = stream.getvalue()
    assert said.count("saving the model (0:0") >= 3
    assert not [thread for thread in threading.enumerate() if thread.name == "cagsr-progress"]
    time.sleep(0.15)
    assert stream.getvalue() == said


def test_a_display_is_opened_once_and_by_the_main_process_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with shown("outer"):
        outer = progress._CURRENT.get()
        with shown("inner"):
            assert progress._CURRENT.get() is outer
    assert progress._CURRENT.get() is None
    monkeypatch.setenv("RANK", "1")
    with shown("another process"):
        assert progress._CURRENT.get() is None
    say("A [note].")
    assert capsys.readouterr() == ("", "A [note].\n")


def test_bars_on_a_terminal_and_rows_where_they_belong(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    with Display("x", Console(file=stream, force_terminal=True, width=140)) as display:
        before = progress._CURRENT.set(display)
        with working("step", 3) as task, working("sampling", 8, "tokens"):
            task.advance(2)
            task.note = lambda: "reward 0.5"
            say("A [note].")
            print("a row")  # standard output is no terminal here
            deadline = time.monotonic() + 10
            while "0/8 tokens" not in stream.getvalue() and time.monotonic() < deadline:
                time.sleep(0.01)
        progress._CURRENT.reset(before)
    said = stream.getvalue()
    for expected in ("step", "2/3", "reward 0.5", "0/8 tokens", "A [note]."):
        assert expected in said
    assert "a row" not in said
    assert capsys.readouterr().out == "a row\n"


# ---- every command ----

COLOURS, ANIMALS = ("red", "blue", "green", "big", "small"), ("cat", "dog", "bird", "house", "tree")
ROWS = [
    {
        "prompt": f"tell me about the {colour} {animal}",
        "completion": f" the {colour} {animal} likes food .",
        "chosen": f" the {colour} {animal} likes food .",
        "rejected": " the name .",
        "candidates": [f"the {colour} {animal}", "a name"],
    }
    for colour in COLOURS
    for animal in ANIMALS
]
SHORT = "--sampling.num_generations 2 --sampling.max_new_tokens 4 --batch_size 4"
ASSOCIATIONS = "--reward.associations.answers 30 --reward.associations.min_count 2"
TRAINER = "--model start --data rows.jsonl --output_dir out --steps 2 --batch_size 4 --micro_batch_size 2"
SAMPLING = r"> sampling \d/4 tokens \("
ANSWERING = r"answering \d+/25 prompts"


@dataclass(frozen=True)
class Case:
    """A command, the lines that its slow phases must give, and what it must say at its end."""

    words: str
    phases: tuple[str, ...]
    ends: tuple[str, ...]


CASES = {
    "generate": Case(
        "--model start --data rows.jsonl --output answers.jsonl --sampling.max_new_tokens 4 --batch_size 8",
        (rf"^{ANSWERING} .*{SAMPLING}", r"^answering 16/25 prompts \(\d:\d\d, \d:\d\d left\)"),
        (r"^answers\.jsonl: 25 answers to 25 prompts, [1-4]\.\d tokens on average, \d+% ended by themselves\.$",),
    ),
    "score": Case(
        "--model start --data rows.jsonl --output scores.jsonl --batch_size 8",
        (r"^scoring 8/25 pairs .*> scoring 0/1 batches",),
        (r"^scores\.jsonl: 25 pairs scored\.$",),
    ),
    "rank": Case(
        f"--model start --data rows.jsonl --output best.jsonl {SHORT}",
        (rf"^{ANSWERING} .*{SAMPLING}", rf"^{ANSWERING} .*> scoring \d/1 batches"),
        (r"^best\.jsonl: 50 answers to 25 prompts ranked; the best one's reward is \d\.\d\d above its prompt's mean",),
    ),
    "rank-given": Case(
        "--model start --data rows.jsonl --output best.jsonl --candidates_column candidates",
        (r"^ranking 7/25 prompts .*> scoring 0/1 batches",),
        (r"^best\.jsonl: 50 answers to 25 prompts ranked",),
    ),
    "eval": Case(
        "--model start --data rows.jsonl --against other --sampling.max_new_tokens 4 --batch_size 16 --judge_model judge "
        "--markdown eval.md",
        (
            rf"^temperature 1 .*> {ANSWERING} .*{SAMPLING}",
            r"^greedy .*> reading entropies \d/\d batches",
            r"^matching the entropy .*> answering",
            r"^judging the answers .*> judging by perplexity \d/\d batches",
        ),
        (r"^Judged: \d+ answers to 25 prompts\.$", r"^The tables: eval\.md$"),
    ),
    "diagnose": Case(
        f"--model start --data rows.jsonl --output found.json {SHORT} {ASSOCIATIONS}",
        (
            rf"^learning associations .*> {ANSWERING} .*{SAMPLING}",
            rf"^measuring the terms .*> {ANSWERING} .*{SAMPLING}",
            rf"^measuring the terms .*> {ANSWERING} .*> scoring",
            rf"^measuring the terms .*> {ANSWERING} .*> reading the attention of every layer",
        ),
        (r"^Diagnosed 25 prompts, 2 answers each: (recommended are|no term helps)", r"^All numbers: found\.json"),
    ),
    "view": Case(
        "--model start --data rows.jsonl --answers 2 --sampling.max_new_tokens 4 --out page.html",
        (r"sampling \d/4 tokens", r"scoring \d/\d batches"),
        (r"^page\.html: .* MB",),
    ),
    "synthesize": Case("--data rows.jsonl --output made.jsonl", (), (r"^made\.jsonl: \d+ pairs",)),
    "sft": Case(
        TRAINER,
        (r"^step 1/2 \(\d:\d\d, \d:\d\d left\)  loss \d\S* > forward and backward [01]/2 batches",),
        (r"^Done: the model is in out\. 2 steps, training loss \d+\.\d{3} at first, \d+\.\d{3} at last\.$",),
    ),
    "dpo": Case(
        TRAINER,
        (r"^step 1/2 \(\d:\d\d, \d:\d\d left\)  loss \d\S*  accuracy [\d.]+ > forward and backward",),
        (r"^Done: the model is in out\. 2 steps, .* at last, \d+% of the pairs ranked right\.$",),
    ),
    "reward-model": Case(
        TRAINER,
        (
            r"^step 1/2 \(\d:\d\d, \d:\d\d left\)  loss \d\S*  accuracy [\d.]+ > forward and backward",
            r"measuring on held-out pairs .*> scoring by \S+ 0/1 batches",
        ),
        (r"^Done: the model is in out\. 2 steps, .* at last, accuracy .* on \d+ held-out pairs\.$",),
    ),
    "train": Case(
        "--model start --data rows.jsonl --output_dir run --steps 2 --run.batch_size 4 --sampling.num_generations 2 "
        f"--sampling.max_new_tokens 4 --ppo.micro_batch_size 4 --reward.associated_coverage.weight 1 {ASSOCIATIONS}",
        (
            rf"^learning associations .*> answering \d+/20 prompts .*{SAMPLING}",
            rf"^answering held-out prompts 0/1 batches .*{SAMPLING}",
            rf"^step 0/2 \(\d:\d\d\) {SAMPLING}",
            r"^step 1/2 \(\d:\d\d, \d:\d\d left\)  reward \S+  kl \S+  length .*> scoring 1/2 batches",
            r"> scoring by the reference \d/2 batches",
            r"> updating \d/\d+ gradient steps .*> forward and backward \d/\d batches",
            rf"^step 1/2 .*> answering held-out prompts 0/1 batches .*{SAMPLING}",
        ),
        (
            r"^Done: the trained model is in run/final",
            r"^Held out, .*: sampled \d\.\d{3} -> \d\.\d{3}, greedy \d\.\d{3} -> \d\.\d{3}\.$",
        ),
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    for seed, name in enumerate(("start", "other", "judge")):
        tiny.save_model(folder / name, seed=seed)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    every_pass_is_long(monkeypatch)


def run(name: str, words: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command in a folder of its own beside the shared models and rows."""
    for one in place.iterdir():
        (tmp_path / one.name).symlink_to(one)
    monkeypatch.chdir(tmp_path)
    assert main([name, *words.split()]) == 0


@pytest.mark.parametrize("case", CASES)
def test_long_work_says_where_it_is_and_how_it_ended(
    case: str,
    place: Path,
    tmp_path: Path,
    slow: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    wanted = CASES[case]
    run(case.removesuffix("-given"), wanted.words, place, tmp_path, monkeypatch)
    out, err = capfd.readouterr()
    lines = err.splitlines()
    for pattern in wanted.phases:
        assert any(re.search(pattern, line) for line in lines), (pattern, sorted(set(lines)))
    for pattern in wanted.ends:
        assert re.search(pattern, out + err, re.MULTILINE), (pattern, out, lines[-20:])
    assert " > " not in out  # progress never mixes with what is asked for


@pytest.mark.parametrize("case", ["generate", "sft"])
def test_short_work_says_its_notes_and_its_end_and_no_more(
    case: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # As short as it is on a machine that other work does not hold up.
    monkeypatch.setattr(progress, "FIRST", 600.0)
    run(case, CASES[case].words, place, tmp_path, monkeypatch)
    out, err = capfd.readouterr()
    assert not re.search(r"\d/\d", out + err)
    assert re.search(CASES[case].ends[0], out + err, re.MULTILINE)


def test_rows_on_standard_output_are_rows_alone(
    place: Path, tmp_path: Path, slow: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = CASES["generate"].words.replace("--output answers.jsonl", "")
    run("generate", words, place, tmp_path, monkeypatch)
    out, err = capfd.readouterr()
    assert len([json.loads(line) for line in out.splitlines()]) == 25
    assert "sampling 1/4" in err
    assert "Standard output: 25 answers" in err


def test_a_quiet_training_prints_nothing(
    place: Path, tmp_path: Path, slow: None, capfd: pytest.CaptureFixture[str]
) -> None:
    from cagsr.config import DataConfig, ModelConfig, SftConfig
    from cagsr.sft import sft

    settings = {"steps": 1, "batch_size": 4, "save_every": 0}
    model, data = ModelConfig(str(place / "start"), device="cpu"), DataConfig(str(place / "rows.jsonl"))
    sft(SftConfig(model, data, str(tmp_path / "quiet"), **settings), quiet=True)  # type: ignore[arg-type]
    assert capfd.readouterr() == ("", "")
    sft(SftConfig(model, data, str(tmp_path / "told"), **settings))  # type: ignore[arg-type]
    out, err = capfd.readouterr()
    assert "step 0/1" in err  # a display of its own, where it is called from Python
    assert "Done: the model is in" in out


def test_a_comparison_says_what_its_jobs_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two jobs, each a process that tells of its work in its log and ends once its state was shown."""
    monkeypatch.setattr(progress, "FIRST", 0.02)
    monkeypatch.setattr(progress, "EVERY", 0.02)

    class Plan:
        folder = tmp_path

    def start(self: Any, job: Job) -> Any:
        log = tmp_path / f"{job.name}.log"
        log.write_text("of an earlier start\n")
        program = (
            f"import pathlib, time\nprint('step 3/9 (0:05)', flush=True)\n"
            f"while not pathlib.Path({str(tmp_path / 'enough')!r}).exists(): time.sleep(0.01)"
        )
        with open(log, "ab") as stream:
            began = stream.tell()
            process = subprocess.Popen([sys.executable, "-c", program], stdout=stream, process_group=0)
        return scheduler._Running(job, process, log, began, time.perf_counter())

    def poll(seconds: float) -> None:
        said.extend(capfd.readouterr().err.splitlines())
        if any("one-seed0" in line and ": step 3/9 (0:05); method-two" in line for line in said):
            (tmp_path / "enough").touch()
        sleep(min(seconds, 0.02))

    said: list[str] = []
    sleep = time.sleep
    monkeypatch.setattr(scheduler._Run, "_start", start)
    monkeypatch.setattr(scheduler.time, "sleep", poll)
    monkeypatch.setattr(Job, "is_done", lambda self, plan: self.target == "done")
    jobs = [Job("method", name, 0, (), "") for name in ("done", "one", "two")]
    with shown("cagsr compare"):
        assert scheduler.run_jobs(Plan(), jobs, ["plan.yaml"], parallel=2) == []  # type: ignore[arg-type]
    said += capfd.readouterr().err.splitlines()
    assert said[0] == "1 of 3 jobs are done already; 2 at a time."
    assert any(
        re.fullmatch(r"jobs 1/3 \(\d:\d\d\)  method-one-seed0 \d:\d\d: step 3/9 \(0:05\); method-two-seed0 .*", line)
        for line in said
    ), said
    assert any(re.fullmatch(r"3/3 method-(one|two)-seed0: \d:\d\d", line) for line in said)
