"""The report's tables from results whose means, differences and shares can be worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cagsr.compare import result_figures as figures
from cagsr.compare import result_tables as tables
from cagsr.compare.jobs import GREEDY, MATCHED, SAMPLED, plan_jobs
from cagsr.compare.plan import Files, Method, Plan, RewardModelPlan
from cagsr.compare.results import Results

# Two seeds, four prompts. The start misses half of everything; ours misses 0.2 less sampled, 0.1 less than the start at
# matched entropy, nothing less greedy; people's is as good as the start.
LEVEL = {"start": (0.5, 0.4), "ours": (0.3, 0.4), "people": (0.5, 0.4)}
MATCHED_LEVEL = {"ours": 0.4, "people": 0.5}


@pytest.fixture
def results(tmp_path: Path) -> Results:
    plan = Plan(
        title="t",
        work=str(tmp_path),
        start="x",
        files=Files("a", "b", "c"),
        configs=[],
        seeds=[0, 1],
        primary=["missed"],
        reward_models={"rm": RewardModelPlan(data="p", num_pairs=200, human=True)},
        methods={
            "ours": Method(label="Ours", curve="hybrid"),
            "people": Method(reward_model="rm", curve="human"),
            "half": Method(),
        },
        contrasts=[["ours", "people"], ["ours", "start"]],
    )
    jobs = plan_jobs(plan)
    for job in jobs:
        if job.kind != "method" or (job.target == "half" and job.seed == 1):
            continue
        job.mark_done(plan, seconds=1.0, peak_memory_bytes=2**20)
        name = "ours" if job.target == "half" else job.target
        assert job.seed is not None
        # Prompts differ, and alike in all methods: a paired difference has no spread.
        shape = [0.0, 0.05, -0.05, 0.1 * job.seed]
        values: dict[str, Any] = {
            SAMPLED: [LEVEL[name][0] + move for move in shape],
            GREEDY: [LEVEL[name][1] + move for move in shape],
        }
        if name != "start":
            values[MATCHED] = [MATCHED_LEVEL[name] + move for move in shape]
        scores = {SAMPLED: [1.0, 2.0, 3.0, 4.0], GREEDY: [0.0] * 4, MATCHED: [0.0] * 4}
        if name == "ours":
            scores[SAMPLED] = [2.0, 2.0, 2.0, 5.0]  # wins, ties, loses, wins against the start
        content = {
            "prompts": ["p"] * 4,
            "values": {how: {"missed": column, "reward_model": scores[how]} for how, column in values.items()},
            "texts": {},
            "training": [{"step": 0.0, "held_out": 0.5}, {"step": 1.0, "held_out": 0.6, "reward": 0.2, "kl": 1.0}],
            "costs": {"train_seconds": 10.0, "human_labels": 200.0 if name == "people" else 0.0},
        }
        file = plan.result_file(job.target, job.seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    return Results(plan, jobs)


def row(table: tables.Table, first: str) -> tuple[str, ...]:
    return next(cells for cells in table.rows if cells[0] == first)


def test_only_finished_seeds_count(results: Results):
    assert results.seeds("half") == [0]
    assert results.methods == ["start", "ours", "people", "half"]


def test_levels(results: Results):
    table = tables.levels(results, ["start", "ours"])
    assert table.header == ("method", "seeds", "decoding", "missed", "reward_model")
    # (0.5 + 0 + 0.05 - 0.05 + (0 + 0.1) / 2) / 4 more than the level: 0.0125
    assert row(table, "no RL (start)")[:4] == ("no RL (start)", "2", "sampled", "0.512")
    assert row(table, "Ours")[3] == "0.312"


def test_gains_are_paired(results: Results):
    (table,) = tables.differences(results, ["ours", "people"], ["missed"], "Gains")
    assert row(table, "Ours")[2].startswith("-0.200 [-0.200, -0.200]")
    assert row(table, "Ours")[3].startswith("-0.100 [-0.100, -0.100]")
    assert row(table, "Ours")[4] == "0.000 [0.000, 0.000]"
    assert row(table, "people")[2] == "0.000 [0.000, 0.000]"
    assert "6 comparisons" in table.note
    assert "less is better" in table.note


def test_prompts_without_a_measure_are_left_out_of_tables_and_figures(results: Results):
    """An answer without an equation has no share of equations that hold; it takes its prompt out, and nothing else."""
    file = results.plan.result_file("ours", 1)
    content = json.loads(file.read_text())
    content["values"][GREEDY]["missed"][2] = float("nan")  # 0.2 less than the start on the others
    content["values"][GREEDY]["missed"][0] -= 0.6
    file.write_text(json.dumps(content))
    after, before = results.pair("ours", GREEDY, "missed") or ([], [])
    assert [len(values[0]) for values in (after, before)] == [3, 3]
    (table,) = tables.differences(results, ["ours"], ["missed"], "t")
    assert row(table, "Ours")[4].startswith("-0.100 ")  # one of six is 0.6 lower
    assert figures.gains_figure(results, ["ours", "people"], "missed") is not None
    content["values"][SAMPLED]["missed"] = [float("nan")] * 4
    file.write_text(json.dumps(content))
    again = Results(results.plan, results.jobs)
    assert again.pair("ours", SAMPLED, "missed") is None


def test_contrasts_take_gains_at_matched_entropy(results: Results):
    table = tables.contrasts(results, ["missed"])
    assert table is not None
    found = {(cells[1], cells[4]): cells[5] for cells in table.rows}
    # ours gains 0.1 over its own matched start, people's 0.0 over its own
    assert found["people", "gain at matched entropy"].startswith("-0.100")
    assert found["people", "sampled"].startswith("-0.200")
    assert found["people", "greedy"].startswith("0.000")
    assert found["no RL (start)", "gain at matched entropy"].startswith("-0.100")


def test_methods_against_one_are_paired_on_the_seeds_that_both_have(results: Results):
    (table,) = tables.differences(results, ["half", "people"], ["missed"], "Against ours", "ours")
    assert table.header[2:] == ("sampled", "gain at matched entropy", "greedy")
    # half has one of the two seeds, and on it the values of ours.
    assert row(table, "half")[1:] == ("1", *["0.000 [0.000, 0.000]"] * 3)
    assert row(table, "people")[1] == "2"
    assert row(table, "people")[2].startswith("0.200 [0.200, 0.200]")
    assert row(table, "people")[3].startswith("0.100 [0.100, 0.100]")
    assert row(table, "people")[4].startswith("0.000 [0.000, 0.000]")
    assert "6 comparisons" in table.note


def test_win_rates_count_ties_half(results: Results):
    table = tables.win_rates(results, ["ours"])
    assert table is not None
    assert row(table, "Ours")[1].startswith("0.625")  # (1 + 0.5 + 0 + 1) / 4
    assert row(table, "Ours")[3].startswith("0.500")


def test_training_that_a_judging_job_found_done_still_costs(results: Results):
    assert results.costs("ours")["train_seconds"] == 10.0
    run = results.plan.method_folder("ours", 0)
    run.mkdir(parents=True)
    rows = [{"step": n, "collect_seconds": 3.0, "update_seconds": 1.0, "rollout_seconds": 2.0} for n in (1, 2)]
    (run / "timings.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    # Seed 0 by its own steps, 2 x 4 seconds; seed 1 has no run folder and says 10.
    assert results.costs("ours")["train_seconds"] == 9.0


def test_the_label_curve_starts_without_labels(results: Results):
    human = tables.label_points(results, "human", "missed", SAMPLED)
    assert [(labels, one.mean) for labels, one in human] == [(0.0, 0.0), (200.0, 0.0)]
    hybrid = tables.label_points(results, "hybrid", "missed", SAMPLED)
    assert hybrid[0][0] == 0.0
    assert hybrid[0][1].mean == pytest.approx(-0.2)
    table = tables.label_table(results, "missed")
    assert table is not None
    assert ("sampled", "200", "0.000 [0.000, 0.000]", "") in table.rows


def test_figures_are_repeatable_and_need_nothing(results: Results):
    for svg in (
        figures.gains_figure(results, ["ours", "people"], "missed"),
        figures.training_figure(results, ["ours"]),
        figures.over_optimisation_figure(results, ["ours"]),
    ):
        assert svg is not None
        assert svg.startswith("<svg")
        assert "Ours" in svg
    assert figures.gains_figure(results, ["ours"], "missed") == figures.gains_figure(results, ["ours"], "missed")
    assert figures.gains_figure(results, ["ours"], "unknown") is None
