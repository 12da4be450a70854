"""``cagsr rate`` as a user runs it, and the loop it closes: ratings -> pairs -> reward model -> hybrid training."""

from __future__ import annotations

import json
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest

import apart
import tiny
from cagsr.commands.main import main
from cagsr.rating.rating_questions import RatingQuestion
from cagsr.rating.store import Settings, Store

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "rate.md").read_text(encoding="utf-8")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rate_by_hand(path: Path, rater: str, better: Any) -> None:
    """Judge every question that is left: ``better(question) -> a, b, tie, both_bad or skip``."""
    store = Store(path)
    content = {one.id: one for one in store.questions()}
    progress = store.join(rater)
    while progress.question is not None:
        asked, question = progress.question, content[progress.question.id]
        choice = better(question)
        if choice in ("a", "b"):
            choice = "left" if asked.left == getattr(question, choice) else "right"
        assert store.rate(rater, asked.id, choice, f"{rater}-message-{progress.done}") == "done"
        found = store.progress(rater)
        assert found is not None
        progress = found
    store.close()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two files of answers and a ratings file about them, half rated by one person."""
    for side in "ab":
        write(tmp_path / f"{side}.jsonl", [{"prompt": f"prompt {i}", "completion": f"{side} {i}"} for i in range(4)])
    questions = [RatingQuestion(f"prompt {i}", f"a {i}", f"b {i}") for i in range(4)]
    Store.create(tmp_path / "r.sqlite", questions, Settings("a.jsonl", "b.jsonl", (), 0)).close()
    rate_by_hand(tmp_path / "r.sqlite", "Ada", lambda one: {"a 0": "a", "a 1": "b", "a 2": "tie"}.get(one.a, "skip"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_document_s_loop_runs_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Every command of docs/rate.md's loop as it stands there, on a tiny model, but ``serve``, which people end."""
    tiny.save_model(tmp_path / "start", scale=1.0)
    tiny.save_model(tmp_path / "run" / "final", seed=1)
    tiny.save_prompts(tmp_path / "prompts.jsonl")
    monkeypatch.chdir(tmp_path)
    small = {
        "generate": "--model.device cpu --max_new_tokens 6",
        "reward-model": "--model.device cpu --batch_size 4",
        "train": "--model.device cpu --steps 2 --num_generations 4 --max_new_tokens 6 --ppo.num_ppo_epochs 1",
    }
    loop = DOCUMENT[DOCUMENT.index("## The loop") :].split("\n## ")[0]
    commands = [line.split(" #")[0] for line in re.findall(r"^cagsr (.+)$", loop, re.M)]
    assert [one.split()[0] for one in commands] == [
        "generate",
        "generate",
        "rate",
        "rate",
        "rate",
        "reward-model",
        "train",
    ]
    for command in commands:
        words = shlex.split(command)
        if words[:2] == ["rate", "serve"]:
            _serve_once(words[2:])
            rate_by_hand(Path("ratings.sqlite"), "Ada", lambda one: "a" if " cat " in f" {one.a} " else "b")
        else:
            assert main([*words, *small.get(words[0], "").split()]) == 0, command
    assert "win rate of A" in capsys.readouterr().out
    pairs = lines(Path("pairs.jsonl"))
    assert 6 <= len(pairs) <= 12
    assert all(list(row) == ["prompt", "chosen", "rejected"] for row in pairs)
    logged = lines(Path("hybrid/metrics.jsonl"))
    rewards = [row for row in logged if "rewards/rm/mean" in row]
    assert len(rewards) == 2
    assert all("rewards/grounded_coverage/mean" in row for row in rewards)  # hybrid: both
    assert (Path("hybrid") / "final" / "model.safetensors").exists()


def _serve_once(flags: list[str]) -> None:
    """Start the server, see its link, interrupt it as Ctrl-C does."""
    port = apart.free_port()
    with apart.python("-m", "cagsr.commands.main", "rate", "serve", *flags, "--port", port) as process:
        process.wait_for("Ctrl-C")
        process.kill(signal.SIGINT)
        assert process.wait() == 0, process.said
        said = process.said
    assert f"http://127.0.0.1:{port}/?token=" in said
    assert "Stopped. 0 ratings" in said
    assert "Traceback" not in said


def test_chat_prompts_make_conversational_pairs(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hello?"}]
    path = tmp_path / "r.sqlite"
    Store.create(path, [RatingQuestion(chat, "yes", "no")], Settings("a", "b", (), 0)).close()
    rate_by_hand(path, "Ada", lambda one: "b")
    out = tmp_path / "pairs.jsonl"
    assert main(["rate", "export", "--db", str(path), "--out", str(out)]) == 0
    says = [[{"role": "assistant", "content": text}] for text in ("no", "yes")]
    assert lines(out) == [{"prompt": chat, "chosen": says[0], "rejected": says[1]}]


def test_summary_and_export(place: Path, capsys: Any) -> None:
    assert main(["rate", "summary", "--db", "r.sqlite", "--out", "summary.json"]) == 0
    said = capsys.readouterr().out
    assert "A better 1, B better 1, tie 1, both bad 0, skipped 1" in said
    assert "win rate of A: 0.500 [" in said
    assert "undefined (no questions that two raters have judged)" in said
    found = json.loads((place / "summary.json").read_text())
    assert found["win_rate"]["mean"] == 0.5
    assert found["counts"]["skip"] == 1
    rate_by_hand(place / "r.sqlite", "Bob", lambda one: "b")
    assert main(["rate", "summary", "--leave_out", "Ada"]) == 2
    assert "ratings.sqlite: no such ratings file" in capsys.readouterr().err
    assert main(["rate", "summary", "--db", "r.sqlite", "--leave_out", "Ada"]) == 0
    assert "win rate of A: 0.000" in capsys.readouterr().out
    assert main(["rate", "export", "--db", "r.sqlite"]) == 0
    captured = capsys.readouterr()
    assert [json.loads(line)["chosen"] for line in captured.out.splitlines()] == ["b 1", "b 3"]
    assert "2 preference pairs; left out: 1 ties, 1 skipped, 2 questions without a majority." in captured.err
    assert main(["rate", "export", "--db", "r.sqlite", "--votes", "each"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("", "--mode is missing"),
        ("sevre", "--mode should be 'serve', 'summary' or 'export'"),
        ("serve --db none.sqlite", "none.sqlite does not exist yet: give --a and --b"),
        ("serve --db none.sqlite --a a.jsonl", "--b is missing"),
        ("serve --db none.sqlite --b a.jsonl", "--a is missing"),
        ("serve --db none.sqlite --a a.jsonl --b b.jsonl --pairs p.jsonl", "Give one of these"),
        ("serve --db none.sqlite --a a.jsonl --b none.jsonl", "--b none.jsonl: no such file; check the path."),
        ("serve --db none.sqlite --a a.jsonl --b a.jsonl", "There is nothing to rate"),
        ("serve --db none.sqlite --pairs a.jsonl", "a.jsonl, row 1: no answer in column 'a'"),
        ("serve --db no/folder.sqlite --a a.jsonl --b b.jsonl", "the folder no does not exist"),
        ("serve --db .", "--db .: is a folder"),
        ("serve --db a.jsonl", "a.jsonl is no ratings file"),
        ("serve --db r.sqlite --a b.jsonl --b a.jsonl", "other questions than these files (4 are new, 4 are missing)"),
        ("serve --db r.sqlite --gold a.jsonl", "--gold: give it together"),
        ("serve --db r.sqlite --seed 3", "was begun with seed 0"),
        ("serve --db r.sqlite --scales", "was begun without scales"),
        ("serve --db r.sqlite --port 70000", "--port 70000: must lie between"),
        ("serve --db r.sqlite --out x", "--out and --leave_out belong to"),
        ("summary --db none.sqlite", "none.sqlite: no such ratings file"),
        ("summary --db a.jsonl", "a.jsonl is no ratings file"),
        ("summary --db r.sqlite --a a.jsonl", "--a belongs to cagsr rate serve"),
        ("summary --db r.sqlite --votes each", "--votes belongs to cagsr rate export"),
        ("summary --db r.sqlite --leave_out Bob", "no such rater in r.sqlite (there are: Ada)"),
        ("summary --db r.sqlite --out no/s.json", "--out no/s.json: the folder no does not exist"),
        ("export --db r.sqlite --out .", "--out .: is a folder"),
        ("export --db r.sqlite --leave_out Ada", "no rating prefers an answer"),
    ],
)
def test_bad_input_is_one_sentence(place: Path, capsys: Any, line: str, sentence: str) -> None:
    before = sorted(path.name for path in place.iterdir())
    assert (
        main(["rate", *line.split(), *(["--port", "0"] if line.startswith("serve") and "--port" not in line else [])])
        == 2
    )
    said = capsys.readouterr().err
    assert sentence in said
    assert said.startswith("cagsr rate: error: ")
    assert sorted(path.name for path in place.iterdir()) == before


def test_a_ratings_file_that_is_cut_short_is_one_sentence(place: Path, capsys: Any) -> None:
    content = (place / "r.sqlite").read_bytes()
    (place / "cut.sqlite").write_bytes(content[: len(content) // 2 + 100])
    for mode in ("summary", "export"):
        assert main(["rate", mode, "--db", "cut.sqlite"]) == 2
        assert "cut.sqlite" in capsys.readouterr().err
