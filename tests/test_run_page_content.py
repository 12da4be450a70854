"""What a run's page says, without a browser: states, curves, answers, costs, settings, errors, escaping, size."""

from __future__ import annotations

import fcntl
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cagsr.commands.main import main
from cagsr.run_page.metric_curves import curve_data, curves_of, smooth, thin
from cagsr.run_page.overview_tables import changed_settings, costs, differing_settings, ends
from cagsr.run_page.read_run import Run, find_run, labels, read_run
from cagsr.run_page.run_html import content_of, render_page
from cagsr.run_page.sample_answers import answers_of, word_diff
from run_pages import HOSTILE, WARNING, make_run, metrics, sample, write


def read(folder: Path) -> Run:
    return read_run(folder, folder.name)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert main(["report", *argv]) == 2
    said = capsys.readouterr().err
    assert said.count("error:") == 1
    assert "Traceback" not in said
    return said


# ---- Where a run stands ----------------------------------------------------------------------------------------------


def test_a_finished_run_is_finished(tmp_path: Path) -> None:
    state = read(make_run(tmp_path / "run")).state
    assert (state.kind, state.sentence) == ("finished", "Training is finished: 20 steps.")
    assert state.written == (tmp_path / "run" / "metrics.jsonl").stat().st_mtime


def test_the_lock_tells_running_from_stopped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", done=7, final=False)
    with open(run / "run.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        state = read(run).state
        assert state.kind == "running"
        assert "step 7 of 20" in state.sentence
    state = read(run).state
    assert state.kind == "stopped"
    assert "at step 7 of 20" in state.sentence
    assert "killed" in state.sentence
    assert "--resume" in state.sentence


def test_looking_leaves_the_lock_to_the_training(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", done=7, final=False)
    read(run)
    with open(run / "run.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert (run / "run.lock").read_text() == "1\n"


def test_training_begins_though_a_page_is_looking(tmp_path: Path) -> None:
    """A shared lock held for a moment must not make a training refuse its folder."""
    import threading

    from cagsr.runs.folder import RunFolder

    run = make_run(tmp_path / "run", done=7, final=False)
    looking = open(run / "run.lock", "rb")  # noqa: SIM115
    fcntl.flock(looking, fcntl.LOCK_SH)
    threading.Timer(0.03, looking.close).start()
    with RunFolder.open(run, (run / "config.yaml").read_text(), resume=False, overwrite=True):
        assert read(run).state.kind == "waiting"


def test_a_final_model_of_fewer_steps_does_not_make_a_run_finished(tmp_path: Path) -> None:
    """Resumed for more steps and killed: final/ is there, but it is the earlier one."""
    assert read(make_run(tmp_path / "run", steps=30, done=25)).state.kind == "stopped"


def test_all_steps_without_a_final_model_is_not_finished(tmp_path: Path) -> None:
    state = read(make_run(tmp_path / "run", final=False)).state
    assert state.kind == "stopped"
    assert "before the final model" in state.sentence


def test_a_monitors_stop_is_told_from_a_kill(tmp_path: Path) -> None:
    stop = WARNING | {"step": 9, "action": "stop"}
    state = read(make_run(tmp_path / "run", done=9, final=False, warnings=[stop])).state
    assert state.sentence.startswith("A monitor stopped the training at step 9 of 20")
    # The same warning, but the run was resumed beyond it and then killed.
    state = read(make_run(tmp_path / "two", done=12, final=False, warnings=[stop])).state
    assert "killed" in state.sentence


def test_a_run_before_its_first_step(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", done=0, final=False)
    assert "before its first step" in read(run).state.sentence
    page = render_page([read(run)])
    assert "No step yet" not in page  # step 0 has its evaluation
    with open(run / "run.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert read(run).state.kind == "waiting"


# ---- Which folder ------------------------------------------------------------------------------------------------------


def test_a_quickstarts_folder_means_the_run_in_it(tmp_path: Path) -> None:
    make_run(tmp_path / "quick" / "run")
    (tmp_path / "quick" / "quickstart.yaml").write_text("seed: 0\n")
    assert find_run(tmp_path / "quick") == tmp_path / "quick" / "run"


@pytest.mark.parametrize("command", ["sft", "dpo", "reward-model"])
def test_folders_of_other_commands_are_named(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / f"{command}.yaml").write_text("seed: 0\n")
    said = refused(capsys, str(tmp_path / "x"))
    assert f"a cagsr {command}" in said
    assert "no log of its steps" in said


def test_what_is_no_run_is_refused_with_what_to_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "runs" / "one")
    assert "give that folder" in refused(capsys, str(run / "final"))
    assert str(run) in refused(capsys, str(tmp_path / "runs"))
    assert "does not exist" in refused(capsys, str(tmp_path / "absent"))
    assert "is a file" in refused(capsys, str(run / "config.yaml"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("a")
    assert "is no run" in refused(capsys, str(tmp_path / "other"))
    assert "twice" in refused(capsys, str(run), str(run / "." / ""))
    assert "exclude each other" in refused(capsys, str(run), "--serve", "--out", "x.html")
    assert "--port 70000" in refused(capsys, str(run), "--serve", "--port", "70000")


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "b" / "other"]
    assert labels(paths) == ["a/run", "b/run", "other"]


# ---- Broken and half-written files --------------------------------------------------------------------------------------


def test_a_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", done=7, final=False)
    for name in ("metrics", "timings", "samples", "warnings"):
        with open(run / f"{name}.jsonl", "a") as stream:
            stream.write('{"step": 8, "objective/kl": 0.')
    found = read(run)
    assert found.metrics[-1]["step"] == 7
    assert "data-live" not in render_page([found])


def test_an_unreadable_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    rows = (run / "samples.jsonl").read_text().splitlines()
    (run / "samples.jsonl").write_text("\n".join([*rows[:3], "{oh", *rows[3:]]) + "\n")
    assert f"{run / 'samples.jsonl'}, line 4" in refused(capsys, str(run))
    write(run / "samples.jsonl", [{"prompt": "no step"}])
    assert f"{run / 'samples.jsonl'}, line 1 has no step" in refused(capsys, str(run))
    (run / "config.yaml").write_text("a: [1\nb: 2\n")
    assert f"{run / 'config.yaml'}, line 2" in refused(capsys, str(run))


# ---- Curves ----------------------------------------------------------------------------------------------------------


def test_every_metric_is_a_curve_and_the_points_are_the_files(tmp_path: Path) -> None:
    run = read(make_run(tmp_path / "run", warnings=[WARNING]))
    curves = curves_of([run])
    keys = [curve.key for curve in curves]
    assert set(metrics(5)) - {"step"} <= set(keys)
    points, thinned = curve_data([run], curves)
    assert not thinned
    for key in keys:
        expected = [(row["step"], row[key]) for row in run.metrics if key in row]
        if key in ("step_seconds", "tokens_per_second"):
            expected = [(step, {"step_seconds": 3.5, "tokens_per_second": 200.0}[key]) for step in range(1, 21)]
        assert list(zip(points[key][0]["step"], points[key][0]["value"], strict=True)) == expected
    marked = {key for key in keys if points[key][0]["marks"]}
    assert marked == {"response/length"}
    assert points["response/length"][0]["marks"][0][0] == 9


def test_the_reward_is_the_raw_one_where_it_is_logged(tmp_path: Path) -> None:
    titles = {curve.key: curve for curve in curves_of([read(make_run(tmp_path / "a"))])}
    assert titles["objective/raw_scores"].title == "Reward"
    assert titles["objective/scores"].group == "More curves"
    rows = [{"step": 1, "objective/scores": 0.1}]
    alone = curves_of([read(make_run(tmp_path / "b", rows=rows))])[0]
    assert (alone.key, alone.title, alone.group) == ("objective/scores", "Reward", "Reward")


def test_numbers_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    rows = [{"step": s, "objective/kl": v} for s, v in enumerate([1.0, None, "Infinity", 2.0], start=1)]
    run = read(make_run(tmp_path / "run", rows=rows))
    points, _ = curve_data([run], curves_of([run]))
    assert points["objective/kl"][0]["value"] == [1.0, None, None, 2.0]
    found = ends(run, "objective/kl")
    assert found is not None
    assert (found["first"], found["last"], found["highest"]) == (1.0, 2.0, 2.0)
    render_page([run])  # NaN and infinities are no JSON


def test_smoothing_by_hand() -> None:
    assert smooth([1.0] * 23) is None
    values: list[float | None] = [float(place) for place in range(24)]
    found = smooth(values)
    assert found is not None
    assert found[0] == 0.5  # a window of 1 to each side, cut at the end
    assert found[10] == 10.0
    values[10] = None
    found = smooth(values)
    assert found is not None
    assert found[10] == 10.0
    assert found[11] == 11.5


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=300), st.integers(4, 60))
def test_thinning_keeps_ends_and_extremes(values: list[float], most: int) -> None:
    kept = thin(values, most)
    assert len(kept) <= most or len(values) <= most
    assert kept == sorted(set(kept))
    assert {0, len(values) - 1} <= set(kept)
    assert max(values[place] for place in kept) == max(values)
    assert min(values[place] for place in kept) == min(values)


# ---- Answers ---------------------------------------------------------------------------------------------------------


def test_word_diff_by_hand() -> None:
    found = word_diff("the red cat sees a house", "the cat sees a big house.")
    assert [piece for piece in found if piece[0] == -1] == [[-1, " red"]]
    assert "".join(text for kind, text in found if kind == 1) == " big."
    assert found[0] == [0, "the"]


@settings(max_examples=50, deadline=None)
@given(st.text("ab .,\n", max_size=30), st.text("ab .,\n", max_size=30))
def test_a_diff_holds_both_texts(before: str, after: str) -> None:
    pieces = word_diff(before, after)
    assert "".join(text for kind, text in pieces if kind != 1) == before
    assert "".join(text for kind, text in pieces if kind != -1) == after


def test_answers_are_compared_with_the_first_to_the_same_prompt(tmp_path: Path) -> None:
    held = [{"step": step, "prompt": "p", "completion": text, "metric": 0.5} for step, text in ((0, "a b"), (5, "a c"))]
    samples = [
        sample(1, "p", "x y", 0.1),
        sample(4, "q", "z", 0.2),
        sample(6, "p", "x y", 0.3),
        sample(6, "p", "x w", 0.4),
    ]
    found = answers_of(read(make_run(tmp_path / "run", samples=samples, held_out=held)), 10**6)
    by = {(row["step"], row["text"]): row for row in found["rows"]}
    assert "diff" not in by[0, "a b"]
    assert by[5, "a c"]["diff"] == [[0, "a"], [-1, " b"], [1, " c"]]  # with the start's greedy answer, not a sample
    assert by[5, "a c"]["first"]["step"] == 0
    assert "diff" not in by[4, "z"]
    assert by[6, "x y"]["same"]
    assert by[6, "x w"]["first"] == {"step": 1, "reward": 0.1, "text": "x y"}
    assert by[6, "x w"]["terms"] == [["coverage", 0.8, 0.4], ["repetition", None, 0.0]]
    assert found["prompts"] == ["p", "q"]


def test_answers_are_left_out_evenly_and_the_ends_stay(tmp_path: Path) -> None:
    samples = [sample(step, f"prompt {step}", "word " * 50, 0.1) for step in range(1, 201)]
    found = answers_of(read(make_run(tmp_path / "run", samples=samples)), 20_000)
    steps = [row["step"] for row in found["rows"]]
    assert (steps[0], steps[-1]) == (1, 200)
    assert 5 <= len(steps) <= 20
    assert found["left_out"] == 200 - len(steps)
    gaps = [b - a for a, b in pairwise(steps)]
    assert max(gaps) - min(gaps) <= 1


# ---- Tables ----------------------------------------------------------------------------------------------------------


def test_costs_by_hand(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    found = costs(read(run))
    assert found is not None
    assert found["total"] == 70.0
    assert [(name, seconds) for _, name, seconds, _ in found["parts"]] == [
        ("collect_seconds", 40.0), ("update_seconds", 20.0), ("evaluation_seconds", 10.0)]  # fmt: skip
    assert found["tokens"] == 14_000
    assert found["per_second"] == 200.0
    assert found["sampling_per_second"] == 350.0
    assert found["memory"] is None
    assert "not recorded" in render_page([read(run)])
    inside = {"rollout_seconds": 0.5, "scoring_seconds": 0.25}
    write(run / "timings.jsonl", [{"step": 1, "collect_seconds": 1.0, "peak_memory_bytes": 3 * 2**30} | inside])
    assert "3.00 GiB" in render_page([read(run)])
    parts = costs(read(run))
    assert parts is not None
    # What lies inside a phase is no time of its own.
    assert parts["total"] == 1.0
    assert [(key, seconds, share) for _, key, seconds, share in parts["parts"]] == [
        ("rollout_seconds", 0.5, 0.5), ("scoring_seconds", 0.25, 0.25), ("collect_seconds", 0.25, 0.25)]  # fmt: skip


def test_settings_that_are_not_the_default(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    changed = {key: (value, default) for key, value, default in changed_settings(read(run))}
    assert changed == {"model.path": ("start", ""), "data.path": ("prompts.jsonl", ""), "output_dir": (str(run), ""),
                       "run.steps": ("20", "100")}  # fmt: skip
    other = make_run(tmp_path / "other", steps=30)
    assert differing_settings([read(run), read(other)]) == [("run.steps", ["20", "30"])]


# ---- The file --------------------------------------------------------------------------------------------------------


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    warning = {"step": 2, "name": HOSTILE, "sentence": HOSTILE, "action": "warn"}
    samples = [sample(1, HOSTILE, HOSTILE, 0.1) | {"terms": {HOSTILE: 1.0}}]
    rows = [{"step": 1, HOSTILE: 1.0, "objective/kl": 0.1}]
    run = make_run(tmp_path / "run", warnings=[warning], samples=samples, rows=rows)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text + f"extra: {json.dumps(HOSTILE)}\n")
    page = render_page([read_run(run, HOSTILE)])
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert page.count("</script>") == 3
    assert page.count("<script") == 3
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S).group(1))
    assert data["answers"][0]["rows"][0]["text"] == HOSTILE


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    page = render_page([read(make_run(tmp_path / "run"))])
    head = page[: page.index("<script type")]
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', head).group(1)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src" not in policy
    assert "'unsafe-eval'" not in policy
    assert not re.search(r'(src|href)="(?!#|data:)', head)


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    """4,000 steps and 16,000 answers of two runs, each new to its prompt."""
    rows = [metrics(step) for step in range(1, 4001)]
    samples = [
        sample(step, f"prompt {step % 50} " + "word " * 40, f"answer {step} " * 40, 0.1) for step in range(1, 4001)
    ] * 2
    runs = [read(make_run(tmp_path / name, steps=4000, done=1, rows=rows, samples=samples)) for name in "ab"]
    content = content_of(runs)
    assert len(render_page(runs, content).encode()) < 4_000_000
    assert content.data["thinned"]
    for one in content.data["points"]["objective/kl"]:
        assert (one["step"][0], one["step"][-1]) == (1, 4000)
        assert one["value"][-1] == 4000 * 0.37


def test_the_command_writes_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other", done=3, final=False)
    assert main(["report", str(run)]) == 0
    assert "Training is finished" in (run / "report.html").read_text()
    assert "run: Training is finished: 20 steps." in capsys.readouterr().err
    assert main(["report", str(run), str(other)]) == 0
    assert "at step 3 of 20" in (tmp_path / "report.html").read_text()
    assert main(["report", str(run), "--out", str(tmp_path / "new" / "page.html")]) == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["page.html"]


def test_an_old_page_goes_with_the_run_it_shows(tmp_path: Path) -> None:
    from cagsr.runs.folder import RunFolder

    run = make_run(tmp_path / "run")
    (run / "report.html").write_text("old")
    RunFolder.open(run, (run / "config.yaml").read_text(), resume=False, overwrite=True).close()
    assert not (run / "report.html").exists()
