"""Answers that a stopped judgement sampled are not sampled again, unless what they depend on has changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from cagsr.compare.jobs import Job
from cagsr.compare.kept_answers import kept_answers
from cagsr.compare.plan import Files, Method, Plan
from cagsr.evaluation.matched_entropy import SampledAnswers


def test_a_stopped_judgement_keeps_its_answers(tmp_path: Path):
    files = Files(train="", held_out="", test="")
    plan = Plan(title="", work=str(tmp_path), start="", files=files, configs=[], methods={"ours": Method()})
    test = tmp_path / "test.jsonl"
    test.write_text("one")
    job = Job("method", "ours", 0, (), "a", judged_on=(str(test),))
    sampled: list[str] = []

    def ask(name: str, job: Job, *, stopped: bool) -> tuple[SampledAnswers, float]:
        def sample() -> tuple[SampledAnswers, float]:
            sampled.append(name)
            return SampledAnswers(
                ("yes", "no"), np.array([np.nan, 0.5]), np.array([3.0, 4.0]), np.array([1.0, 0.0])
            ), 0.7

        try:
            with kept_answers(plan, job) as kept:
                found = kept.get("greedy", sample)
                if stopped:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert list(tmp_path.rglob("greedy.json"))
        return found

    ask("first", job, stopped=True)
    answers, temperature = ask("again", job, stopped=False)
    assert sampled == ["first"]
    assert (answers.texts, temperature) == (("yes", "no"), 0.7)
    assert np.isnan(answers.entropy[0])
    assert (answers.entropy[1], answers.tokens.tolist(), answers.ended.tolist()) == (0.5, [3.0, 4.0], [1.0, 0.0])
    assert not list(tmp_path.rglob("greedy.json"))  # finished: nothing is left
    ask("before the plan changed", job, stopped=True)
    changed = replace(job, fingerprint="b")
    ask("after", changed, stopped=True)
    test.write_text("two")
    ask("after the file changed", changed, stopped=False)
    assert sampled[1:] == ["before the plan changed", "after", "after the file changed"]
