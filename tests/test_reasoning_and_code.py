"""Final answers, equations, programs: what is right is right, and code is taken from answers as they come."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from cagsr.commands.main import main
from cagsr.config import SalienceConfig
from cagsr.errors import ConfigError
from cagsr.evaluation import checks
from cagsr.evaluation.pass_at_k import pass_at_k, passes
from cagsr.flow import EncodedPrompt, Episode, Prompt, RewardBatch, Segment
from cagsr.prompts.code_words import code_words
from cagsr.prompts.find_words import find_words
from cagsr.prompts.salience import DocumentFrequency, salient_words
from cagsr.reward.build import weighted_terms
from cagsr.reward.registry import Resources
from cagsr.reward.settings import RewardConfig
from cagsr.reward.terms.exact_match import ExactMatch, ExactMatchConfig
from cagsr.reward.terms.execution import Execution, ExecutionConfig
from cagsr.reward.turns import Exchanges
from cagsr.sandbox import run
from cagsr.sandbox.run import SandboxConfig, protection, unprotected
from cagsr.tasks.arithmetic import equations
from cagsr.tasks.code import Repair, code_of, row_tests, run_answers
from cagsr.tasks.final_answer import final_answer, is_right, same_answer
from test_reward_turns import by_hand

SHARED = Path(__file__).parents[2] / "shared" / "data"
sandboxed = pytest.mark.skipif(bool(unprotected(protection())), reason="this machine can't protect itself from code")


# ---- answers ----


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 2 = 4\n#### 72", "72"),
        ("#### 1\nno, #### 2", "2"),
        (r"so \boxed{\frac{1}{2}} is it", r"\frac{1}{2}"),
        ("<answer> 7 </answer> or so 8", "7"),
        ("#### 3\n<answer>4</answer>", "4"),
        ("The answer is 42.", "42"),
        ("The final answer: **Paris**", "Paris"),
        ("She pays $1,234.50 in 3 days, 12 in all", "12"),
        ("it costs 3,000 dollars", "3,000"),
        ("x2 is no number", None),
        (r"\boxed{never closed", None),
        ("", None),
    ],
)
def test_the_final_answer(text: str, answer: str | None):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("72", "72.0", True),
        ("$1,000", "1000", True),
        ("18 dollars", "18", True),
        ("-5", "5", False),
        ("Paris.", "paris", True),
        ("the  red cat", "The red cat", True),
        ("1e3", "1000", True),
        ("3", "three", False),
        ("1/2", "1/2", True),
        ("1/2", "1/3", False),
    ],
)
def test_equal_answers(one: str, other: str, same: bool):
    assert same_answer(one, other) is same
    assert same_answer(other, one) is same


def test_a_reference_is_a_result_or_a_worked_solution():
    assert is_right("4 + 4 = 8\n#### 8", "3 + 5 = <<3+5=8>>8\n#### 8")
    assert is_right("it is 8", 8)
    for bare, wrong in ((r"\frac{3}{4}", "4"), ("1/2", "2"), ("(1, 2)", "2"), ("July 4, 1776", "1776")):
        assert is_right(rf"so \boxed{{{bare}}}", bare)
        assert not is_right(rf"so \boxed{{{wrong}}}", bare)
    assert not is_right("", "8")
    assert not is_right("it is 9", "#### 8")


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("48/2 = <<48/2=24>>24 clips", [True]),
        ("2+2=5, then 5*2 = 10", [False, True]),
        ("10 - 4 = 6 = 3 + 3", [True, True]),
        ("1/3 = 0.33 and 2/3 = 0.66", [True, False]),  # to its last digit: 0.67
        ("10/3 = 3", [False]),
        ("( 2 + 3 ) *4 =20", [True]),
        (" + ".join(["12"] * 60) + " apples", []),  # in no time
        ("(2 + 3) * 4 = 20", [True]),
        ("$1,000 - $250 = $750", [True]),
        ("0.5 * 8 = 4; .5*8=4", [True, True]),
        ("6 × 7 = 42 ÷ 1", [True]),
        ("5/0 = 0", [False]),
        ("x + 2 = 3; a = 4; 7 = 7", []),
        ("20% of 50 = 10", []),
        ("-3 + 5 = 2", [True]),
    ],
)
def test_which_equations_hold(text: str, held: list[bool]):
    assert equations(text) == held


@given(st.integers(-999, 999), st.integers(-999, 999), st.sampled_from("+-*"), st.integers(-3, 3))
def test_an_equation_holds_where_python_says_so(one: int, other: int, sign: str, off: int):
    value = {"+": one + other, "-": one - other, "*": one * other}[sign] + off
    left = f"({one}) {sign} ({other})"
    assert equations(f"so {left} = {value}") == [off == 0]


def test_people_s_solutions_hold():
    path = SHARED / "gsm8k" / "train.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    rows = [json.loads(line) for line in path.read_text().splitlines()[:1500]]
    found = [held for row in rows for held in equations(row["answer"])]
    assert len(found) > 4000
    assert sum(found) / len(found) > 0.98  # the rest is algebra and slips
    assert all(is_right(row["answer"], row["answer"]) for row in rows)


def rewarded(batch: RewardBatch, texts: list[str], answers: list[object]) -> RewardBatch:
    prompts = tuple(
        replace(prompt, columns={} if answer is None else {"answer": answer})
        for prompt, answer in zip(batch.episodes.prompts.prompts, answers, strict=True)
    )
    return replace(
        batch,
        episodes=replace(
            batch.episodes, completions=tuple(texts), prompts=replace(batch.episodes.prompts, prompts=prompts)
        ),
    )


def test_exact_match_is_of_the_last_answer_and_of_rows_that_have_a_reference(
    make_reward_batch: Callable[..., RewardBatch],
):
    term = ExactMatch(ExactMatchConfig(weight=1.0))
    batch = make_reward_batch(prompts=2, generations=2)
    found = term(rewarded(batch, ["it is 4", "5", "4", "no"], ["4", "4", None, "no"]))
    assert found.applies.tolist() == [True, True, False, True]
    assert found.values.tolist() == [1.0, 0.0, 0.0, 0.0]  # "no" has no number to end at
    answers = Exchanges.of(by_hand()).batch
    several = term(rewarded(answers, ["4"] * 5, ["4"] * 5))
    assert several.applies.tolist() == [False, True, False, True, True]


# ---- code ----

HUMAN_EVAL = Prompt(
    1,
    'from typing import List\n\n\ndef twice(x: int) -> int:\n    """ Give two x. """\n',
    columns={"test": "def check(candidate):\n    assert candidate(2) == 4\n", "entry_point": "twice"},
)
CHAT = replace(HUMAN_EVAL, messages=({"role": "user", "content": "import math\nWrite twice."},))


@pytest.mark.parametrize(
    ("prompt", "completion", "code"),
    [
        (HUMAN_EVAL, "    return 2 * x\n\ndef other():\n    oops(", HUMAN_EVAL.text + "    return 2 * x\n\n"),
        (HUMAN_EVAL, "    return 2 * x\nprint(twice(3))", HUMAN_EVAL.text + "    return 2 * x\n"),
        (HUMAN_EVAL, "    return 2 * x\n```\nIt doubles.", HUMAN_EVAL.text + "    return 2 * x\n"),
        (HUMAN_EVAL, "    return 2 * x\n\nThe function doubles.", HUMAN_EVAL.text + "    return 2 * x\n\n"),
        (HUMAN_EVAL, "\n    return 2 * x\n\ndef twice(x):\n    return 0", HUMAN_EVAL.text + "\n    return 2 * x\n\n"),
        (
            HUMAN_EVAL,
            "Here:\n```python\ndef twice(x):\n    return 2 * x\n```\nDone.",
            "from typing import List\ndef twice(x):\n    return 2 * x",
        ),
        (HUMAN_EVAL, "def twice(x):\n    return x", "from typing import List\ndef twice(x):\n    return x"),
        (CHAT, "```\ndef twice(x):\n    return x", "import math\ndef twice(x):\n    return x"),
        (CHAT, "def twice(x):\n    return x", "import math\ndef twice(x):\n    return x"),
        (
            replace(
                HUMAN_EVAL,
                text=HUMAN_EVAL.text + "    return x\n\n# The tests failed:\n# x\n# Mended:\n" + HUMAN_EVAL.text,
            ),
            "    return 2 * x",
            HUMAN_EVAL.text + "    return 2 * x",
        ),
    ],
)
def test_the_program_of_an_answer(prompt: Prompt, completion: str, code: str):
    assert code_of(prompt, completion) == code


def test_the_tests_of_a_row():
    assert row_tests(HUMAN_EVAL.columns) == "def check(candidate):\n    assert candidate(2) == 4\n\n\ncheck(twice)\n"
    assert row_tests({"test_list": ["assert f(1)", "assert f(2)"], "test_setup_code": "import math"}) == (
        "import math\nassert f(1)\nassert f(2)\n"
    )
    assert row_tests({"tests": "assert f(1)"}) == "\nassert f(1)\n"
    assert row_tests({"test": "x"}) is None
    assert row_tests({}) is None


@sandboxed
def test_programs_pass_or_fail_their_tests():
    quick = SandboxConfig(seconds=5.0)
    texts = [
        "    return 2 * x",
        "    return x",
        "    return 2 *",
        "    while True: pass",
        "    import sys\n    sys.exit(0)",
    ]
    found = run_answers([HUMAN_EVAL] * 5, texts, replace(quick, seconds=2.0))
    assert [one.kind for one in found if one] == ["passed", "failed", "failed", "timed out", "failed"]
    assert run_answers([HUMAN_EVAL, Prompt(2, "x")], ["    return 2 * x", "x"], quick)[1] is None
    assert run_answers([Prompt(2, "x")], ["x"], quick) == [None]
    columns = {name: [value] * 3 for name, value in HUMAN_EVAL.columns.items()}
    assert checks.passed([HUMAN_EVAL.text] * 3, texts[:3], **columns) == [1.0, 0.0, 0.0]
    assert [one["compiles"] for one in checks.code([HUMAN_EVAL.text] * 3, texts[:3], **columns)] == [1.0, 1.0, 0.0]


@sandboxed
def test_people_s_programs_pass():
    path = SHARED / "humaneval" / "HumanEval.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    rows = [json.loads(line) for line in path.read_text().splitlines()][::8]
    prompts = [Prompt(number, row["prompt"], columns=row) for number, row in enumerate(rows, 1)]
    solved = run_answers(prompts, [row["canonical_solution"] for row in rows], SandboxConfig(seconds=20.0))
    assert [one.kind for one in solved if one] == ["passed"] * len(rows)
    wrong = run_answers(prompts, ["    return None\n"] * len(rows), SandboxConfig(seconds=20.0))
    assert "passed" not in {one.kind for one in wrong if one}


@sandboxed
def test_execution_is_a_term(make_reward_batch: Callable[..., RewardBatch]):
    batch = make_reward_batch(prompts=1, generations=2)
    prompts = (HUMAN_EVAL, replace(HUMAN_EVAL, columns={}))
    episodes = replace(
        batch.episodes,
        completions=("    return 2 * x", "    return 2 * x"),
        prompts=replace(batch.episodes.prompts, prompts=prompts),
    )
    found = Execution(ExecutionConfig(weight=1.0))(replace(batch, episodes=episodes))
    assert found.values.tolist() == [1.0, 0.0]
    assert found.applies.tolist() == [True, False]


def test_code_is_run_where_it_is_wanted_alone(monkeypatch: pytest.MonkeyPatch):
    """score and diagnose show every term they can; not those that run programs or ask for labels."""
    names = {term.name for term, _ in weighted_terms(RewardConfig(), "cpu", Resources(texts=object()), every=True)}  # type: ignore[arg-type]
    assert "coverage" in names
    assert not {"execution", "exact_match"} & names
    monkeypatch.setattr(run, "protection", lambda: ("limits",))
    with pytest.raises(ConfigError, match=r"--reward\.execution\.sandbox\.unprotected"):
        Execution(ExecutionConfig(weight=1.0))


def said(text: str, turn: int = 0) -> Segment:
    return Segment((1,), text, "assistant", turn, sampled=True)


@sandboxed
def test_a_failing_program_comes_back_with_its_traceback():
    task = Repair(sandbox=SandboxConfig(seconds=3.0), lines=2)

    def episode(prompt: Prompt, *texts: str) -> Episode:
        return Episode(EncodedPrompt(prompt, (1,), (0,), (1.0,)), tuple(map(said, texts, range(9))), True)

    good, bad = "    return 2 * x", "    return x"
    replies = task.replies(
        [
            episode(HUMAN_EVAL, good),
            episode(HUMAN_EVAL, bad),
            episode(CHAT, "def twice(x): return x"),
            episode(HUMAN_EVAL, bad, bad),
        ]
    )
    assert replies[0] is None
    assert replies[3] is None  # it has had its turns
    assert replies[1] == (
        '\n\n# The tests failed:\n#   File "program.py", line 9, in check\n# AssertionError\n# Mended:\n'
        + HUMAN_EVAL.text
    )
    assert str(replies[2]).startswith("The tests failed:\n\n")
    assert str(replies[2]).endswith("AssertionError\n\nWrite the whole program again, mended.")
    slow = task.reply(episode(CHAT, "def twice(x):\n    while True: pass"))
    assert "It took too long." in str(slow)
    assert task.reply(episode(Prompt(1, "no tests", columns=HUMAN_EVAL.columns), "    pass")) is not None


# ---- salience of code ----


def test_names_and_docstrings_are_the_words_of_code():
    text = (
        "from typing import List\n\ndef has_close(numbers: List[float], limit=0.5) -> bool:\n"
        '    """ Check if any two are closer than limit 3. """\n    # for now\n    return not numbers and for'
    )
    found = [word.key for word in code_words(text, list(find_words(text)))]
    assert found == [
        "typing", "list", "has_close", "numbers", "list", "float", "limit", "bool",
        "check", "if", "any", "two", "are", "closer", "than", "limit", "3", "for", "now", "numbers",
    ]  # fmt: skip
    broken = 'def f(:\n  x = "never closed'
    assert [word.key for word in code_words(broken, list(find_words(broken)))] == ["f", "x", "never", "closed"]


def test_code_salience_is_a_setting():
    prompt = Prompt(1, "def add(one, two):\n    return")
    config = SalienceConfig(weighting="uniform", code=True)
    found = salient_words(prompt, config, DocumentFrequency(1, {}), "f, row 1")
    assert [one.word.key for one in found] == ["add", "one", "two"]


# ---- pass@k ----


def test_pass_at_k_by_hand():
    assert pass_at_k(5, 2, 1) == pytest.approx(0.4)
    assert pass_at_k(5, 2, 2) == pytest.approx(1 - 3 / 10)  # C(3, 2) of C(5, 2) pairs have none
    assert pass_at_k(5, 0, 3) == 0.0
    assert pass_at_k(5, 3, 3) == 1.0
    with pytest.raises(ValueError, match="pass@6"):
        pass_at_k(5, 2, 6)
    found = passes([np.array([1.0, 0, 0]), np.array([0.0, 0, 0, 1.0]), np.array([1.0, np.nan, 0.0])])
    assert list(found) == ["pass@1", "pass@2", "pass@3"]
    np.testing.assert_allclose(found["pass@2"], [1 - 1 / 3, 1 - 3 / 6, np.nan])


@given(st.integers(1, 12), st.data())
def test_pass_at_k_is_the_mean_over_all_draws(answers: int, data: st.DataObject):
    from itertools import combinations

    passing = data.draw(st.integers(0, answers))
    k = data.draw(st.integers(1, answers))
    marks = [1] * passing + [0] * (answers - passing)
    draws = [any(one) for one in combinations(marks, k)]
    assert pass_at_k(answers, passing, k) == pytest.approx(sum(draws) / len(draws))


def test_eval_prints_pass_at_k(tmp_path: Path):
    rows = [{"prompt": f"tell me about the cat {n}", "answer": "cat"} for n in range(3)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = tiny.save_model(tmp_path / "start")
    command = ["eval", "--model", str(start), "--data", str(tmp_path / "prompts.jsonl"), "--samples", "4", "--temperatures", "1",
               "--checker", "cagsr.evaluation.checks.reasoning", "--max_new_tokens", "4",
               "--output", str(tmp_path / "out.json")]  # fmt: skip
    assert main(command) == 0
    text = (tmp_path / "out.json").read_text()
    assert '"pass@1"' in text
    assert '"pass@4"' in text


# ---- runs ----


def run_flags(folder: Path, **more: Any) -> list[str]:
    given = {
        "--model": folder / "start", "--model.device": "cpu", "--steps": 2, "--run.batch_size": 2, "--num_generations": 4,
        "--max_new_tokens": 8, "--evaluation.held_out": 2, "--ppo.estimator": "rloo", "--salience.weighting": "uniform",
        "--run.sample_rows": 8, **more,
    }  # fmt: skip
    return ["train", *(str(part) for pair in given.items() for part in pair)]


def test_a_run_on_rows_in_gsm8k_s_form(tmp_path: Path):
    tiny.save_model(tmp_path / "start")
    rows = [{"question": f"the cat and the dog {n} .", "answer": f"1+1=<<1+1=2>>2\n#### {n}"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"--data": tmp_path / "rows.jsonl", "--data.prompt_column": "question", "--output_dir": tmp_path / "run",
            "--steps.by": "lines", "--reward.exact_match.weight": 1,
            "--evaluation.metric": "cagsr.evaluation.checks.correct"}  # fmt: skip
    assert main(run_flags(tmp_path, **more)) == 0
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "rewards/exact_match/mean" in metrics[-1]


@sandboxed
def test_a_run_on_rows_in_human_eval_s_form_says_how_code_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tiny.save_model(tmp_path / "start")
    rows = [
        {"prompt": "a cat , the dog , " + "red " * (n % 3), "test": "def check(f):\n    assert f", "entry_point": "cat"}
        for n in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"--data": tmp_path / "rows.jsonl", "--output_dir": tmp_path / "run", "--reward.execution.weight": 1, "--steps": 1,
            "--reward.execution.sandbox.seconds": 2, "--evaluation.metric": "cagsr.evaluation.checks.passed"}  # fmt: skip
    assert main(run_flags(tmp_path, **more)) == 0
    assert "Code of the model's runs under " in capsys.readouterr().out
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["rewards/execution/mean"] == 0.0
