"""``cagsr view`` as a user runs it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

import tiny
from cagsr.commands.main import main

PROMPT = "tell me about the red cat near a house"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {"prompt": "tell me about the red cat", "completion": "the red cat sees a tree ."},
        {"prompt": "tell me about the blue dog", "completion": "a dog", "many": ["a dog", "the blue dog ."]},
        {
            "prompt": "tell me about the green bird near the house",
            "completion": "the bird likes the bird likes the house",
        },
        {"prompt": "tell me about the big tree", "completion": ""},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def see(model: Path, *more: str) -> int:
    return main(["view", "--model", str(model), "--model.device", "cpu", "--max_new_tokens", "6", *more])


def terms(page: str) -> list[dict[str, dict[str, float]]]:
    """Each answer's terms, from the data attributes of the page."""
    found = []
    for card in page.split("<article")[1:]:
        rows = re.findall(
            r'data-term="(\w+)" data-raw="([^"]*)" data-weight="([^"]*)"(?: data-contribution="([^"]*)")?', card
        )
        found.append(
            {name: {"raw": float(raw or "nan"), "weight": float(weight), "contribution": float(part or "nan")}
             for name, raw, weight, part in rows}
        )  # fmt: skip
    return found


@pytest.mark.parametrize(
    "flags", [[], ["--reward.focus.weight", "0.5", "--attention.layers", "0", "--reward.repetition.n", "2"]]
)
def test_the_page_says_what_score_says(model: Path, pairs: Path, tmp_path: Path, flags: list[str]) -> None:
    page, scores, three = tmp_path / "page.html", tmp_path / "scores.jsonl", tmp_path / "three.jsonl"
    three.write_text("".join(line + "\n" for line in pairs.read_text().splitlines()[:3]))  # the fourth has no token
    assert see(model, "--data", str(three), "--row", "3", "--out", str(page), *flags) == 0
    common = ["--model", str(model), "--model.device", "cpu", "--data", str(three), "--reward.normalize", "none"]
    assert main(["score", *common, "--output", str(scores), *flags]) == 0
    scored = json.loads(scores.read_text().splitlines()[2])
    (shown,) = terms(page.read_text())
    assert set(shown) == set(scored["terms"])
    for name, value in scored["terms"].items():
        assert shown[name]["raw"] == pytest.approx(math.nan if value is None else value, abs=1e-6, nan_ok=True), name
    for name, value in scored["contributions"].items():
        assert shown[name]["contribution"] == pytest.approx(value, abs=1e-6), name


def test_sampled_answers_are_those_of_rank(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, best = tmp_path / "page.html", tmp_path / "best.jsonl"
    same = ["--prompt", PROMPT, "--seed", "4", "--salience.weighting", "uniform"]
    assert see(model, *same, "--answers", "4", "--out", str(page)) == 0
    rank = ["rank", "--model", str(model), "--model.device", "cpu", "--max_new_tokens", "6", "--num_generations", "4"]
    assert main([*rank, *same, "--output", str(best)]) == 0
    ranked = json.loads(best.read_text())["candidates"]
    rewards = [float(one) for one in re.findall(r'data-reward="([^"]*)"', page.read_text())]
    assert rewards == pytest.approx([one["reward"] for one in ranked], abs=1e-5)
    for shown, one in zip(terms(page.read_text()), ranked, strict=True):
        for name, value in one["terms"].items():
            assert shown[name]["raw"] == pytest.approx(math.nan if value is None else value, abs=1e-6, nan_ok=True), (
                name
            )


def test_typed_answers_and_a_list_from_a_file(model: Path, pairs: Path, tmp_path: Path) -> None:
    page, picture = tmp_path / "page.html", tmp_path / "page.png"
    assert (
        see(model, "--prompt", PROMPT, "--answer", "a cat", "the red cat", "--out", str(page), "--png", str(picture))
        == 0
    )
    assert len(terms(page.read_text())) == 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert see(model, "--data", str(pairs), "--row", "2", "--response_column", "many", "--out", str(page)) == 0
    assert len(terms(page.read_text())) == 2
    assert see(model, "--data", str(pairs), "--row", "4", "--answers", "3", "--out", str(page)) == 0
    assert len(terms(page.read_text())) == 3


def test_a_picture_alone_writes_no_page(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert see(model, "--prompt", PROMPT, "--answer", "a cat", "--png", "page.png") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["page.png"]
    assert see(model, "--prompt", PROMPT, "--answer", "a cat") == 0
    assert (tmp_path / "view.html").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--prompt", PROMPT], "There are no answers to view"),
        (["--prompt", PROMPT, "--data", "PAIRS", "--answers", "2"], "not both"),
        (["--answers", "2"], "either --data FILE or --prompt TEXT"),
        (["--prompt", PROMPT, "--answer", ""], "zero tokens"),
        (["--data", "PAIRS", "--row", "4"], "row 4, column 'completion': Answer 1 has zero tokens"),
        (["--data", "PAIRS", "--row", "9"], "there is no row 9 among its 4 prompts (rows 1 to 4)"),
        (["--data", "PAIRS", "--row", "0"], "must be 1 or more"),
        (["--data", "PAIRS", "--response_column", "nothing"], "no answer in column 'nothing'"),
        (["--prompt", PROMPT, "--answer", "a cat", "--out", "/nowhere/page.html"], "does not exist"),
        (["--prompt", PROMPT, "--answer", "a cat", "--out", "FOLDER"], "is a folder"),
        (["--prompt", PROMPT, "--answer", "a cat", "--png", "/nowhere/page.png"], "does not exist"),
        (["--prompt", PROMPT, "--answers", "2", "--answer", "a cat"], "not both"),
        (["--prompt", PROMPT, "--answers", "-1"], "must be 0 or more"),
        (["--prompt", PROMPT, "--answer", "a cat", "--row", "2"], "--row names a row of --data"),
        (["--prompt", PROMPT, "--answers", "2", "--attention.layers", "7"], "layer 7"),
        (["--prompt", PROMPT, "--answer", "a cat", "--reward.unsupported.weight", "-1"], "associations"),
        (["--prompt", PROMPT, "--answer", "the cat " * 40], "context of 64"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(
    model: Path, pairs: Path, tmp_path: Path, flags: list[str], sentence: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    given = [{"PAIRS": str(pairs), "FOLDER": str(tmp_path)}.get(flag, flag) for flag in flags]
    assert see(model, *given) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cagsr view: error:")]
    assert len(error) == 1
    assert sentence in error[0]
    assert not list(tmp_path.iterdir())
