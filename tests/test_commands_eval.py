"""``cagsr eval`` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import tiny
from cagsr.commands.main import main
from cagsr.evaluation import metrics


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, test prompts with references, another vocabulary, an encoder-decoder model."""
    folder = tmp_path_factory.mktemp("eval")
    tiny.save_model(folder / "start", scale=4.0)
    tiny.save_model(folder / "tuned", scale=6.0)  # the same weights, more peaked
    tiny.save_model(folder / "t5", "t5")
    rows = [json.loads(line) for line in tiny.save_prompts(folder / "plain.jsonl", 12).read_text().splitlines()]
    rows = [{**row, "references": ["the red cat sees a house", f"a dog {number}"]} for number, row in enumerate(rows)]
    write(folder / "test.jsonl", rows)
    return folder


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluate(*flags: str | Path) -> int:
    return main(["eval", "--model.device", "cpu", *map(str, flags)])


def sampled(room: Path, out: Path, *flags: str | Path, data: str = "test.jsonl") -> dict:
    fixed = ["--model", room / "tuned", "--data", room / data, "--max_new_tokens", "6", "--output", out]
    assert evaluate(*fixed, *flags) == 0
    return json.loads(out.read_text())


def test_a_model_alone(room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = sampled(room, tmp_path / "eval.json", "--samples", "2", data="plain.jsonl")
    warm, greedy = found["results"]
    assert [warm["name"], greedy["name"]] == ["temperature 1", "greedy"]
    assert {len(own) for own in warm["answers"]} == {2}
    assert {len(own) for own in greedy["answers"]} == {1}
    words = warm["measures"]["words"]
    expected = [np.mean([len(metrics.words(text)) for text in own]) for own in warm["answers"]]
    assert words["per_prompt"] == pytest.approx(expected)
    assert words["mean"] == pytest.approx(np.mean(expected))
    assert words["low"] <= words["mean"] <= words["high"]
    assert "self_bleu" in warm["measures"]
    assert "self_bleu" not in greedy["measures"]
    assert found["comparisons"] == []
    shown = capsys.readouterr()
    left_out = [line for line in shown.err.splitlines() if line.startswith("Left out:")]
    assert len(left_out) == 1
    for what in ("ROUGE-L", "--checker", "--embedding_model", "--judge_model", "--reward_model"):
        assert what in left_out[0]
    assert "distinct_1" in shown.out


def test_against_the_start_with_matched_entropy(room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    markdown = tmp_path / "eval.md"
    more = ["--against", room / "start", "--judge_model", room / "start", "--markdown", markdown]
    found = sampled(room, tmp_path / "eval.json", *more)
    both, greedy, matched = found["comparisons"]
    assert (both["model"], both["against"]) == ("temperature 1", "temperature 1")
    assert (greedy["model"], greedy["against"]) == ("greedy", "greedy")
    start_warm, _, start_matched = found["against_results"]
    assert matched["against"] == start_matched["name"]
    # The start has to be cooled down to be as peaked.
    assert start_matched["temperature"] < 1
    entropy = [one["measures"]["entropy"]["mean"] for one in (found["results"][0], start_warm, start_matched)]
    assert abs(entropy[0] - entropy[2]) < 0.2 * abs(entropy[0] - entropy[1])
    for name in ("rouge_l", "follow_up_nll", "lexical_relevance"):
        one = both["measures"][name]
        mine, theirs = found["results"][0]["measures"][name], start_warm["measures"][name]
        assert one["difference"]["mean"] == pytest.approx(mine["mean"] - theirs["mean"])
        assert one["per_prompt"] == pytest.approx(np.subtract(mine["per_prompt"], theirs["per_prompt"]))
        assert one["p"] <= one["p_holm"] <= 1
    assert "| measure | model | against | difference | p |" in markdown.read_text()
    assert "Greedy, both" in capsys.readouterr().out


def test_a_model_against_itself_differs_in_nothing(room: Path, tmp_path: Path) -> None:
    found = sampled(room, tmp_path / "eval.json", "--against", room / "tuned")
    assert len(found["comparisons"]) == 3
    for comparison in found["comparisons"]:
        for name, one in comparison["measures"].items():
            assert one["difference"]["mean"] == pytest.approx(0, abs=1e-9), name
            assert one["p"] in (None, 1.0)
    assert found["against_results"][2]["temperature"] == pytest.approx(1.0)


def test_other_tokens_have_no_matched_entropy(room: Path, tmp_path: Path) -> None:
    other = tiny.save_model(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    found = sampled(room, tmp_path / "eval.json", "--against", other)
    assert len(found["comparisons"]) == 2
    assert any("different tokens" in reason for reason in found["left_out"])


def test_an_encoder_decoder_model(room: Path, tmp_path: Path) -> None:
    flags = ["--model", room / "t5", "--data", room / "test.jsonl", "--max_new_tokens", "4", "--temperatures", "0.7"]
    assert evaluate(*flags, "--output", tmp_path / "eval.json") == 0
    assert json.loads((tmp_path / "eval.json").read_text())["results"][0]["name"] == "temperature 0.7"


def test_finished_answers_are_judged_as_the_model_that_gave_them(room: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    flags = ["--model", room / "tuned", "--model.device", "cpu", "--data", room / "test.jsonl", "--max_new_tokens", "6"]
    more = ["--sampling.temperature", "0", "--output", answers]
    assert main(["generate", *map(str, [*flags, *more])]) == 0
    greedy = sampled(room, tmp_path / "model.json", "--temperatures", "0")["results"][0]
    given = tmp_path / "given.json"
    assert evaluate("--answers", answers, "--data", room / "test.jsonl", "--output", given) == 0
    read = json.loads(given.read_text())["results"][0]
    assert read["answers"] == greedy["answers"]
    for name in ("rouge_l", "words", "lexical_relevance", "repetition", "tokens", "ended"):
        mine, model = read["measures"][name], greedy["measures"][name]
        assert mine["per_prompt"] == pytest.approx(model["per_prompt"]), name
        assert mine["mean"] == pytest.approx(model["mean"]), name


def test_two_files_of_answers_are_paired_by_prompt(tmp_path: Path) -> None:
    first = [{"prompt": f"the {word}", "completion": f"a {word} sees", "reference": f"a {word}"} for word in WORDS]
    # Other order, and no references of their own: those of the first file's rows are used.
    second = [{"prompt": f"the {word}", "completion": "a bird"} for word in reversed(WORDS)]
    flags = ["--answers", write(tmp_path / "a.jsonl", first), "--against_answers", write(tmp_path / "b.jsonl", second)]
    assert evaluate(*flags, "--output", tmp_path / "eval.json") == 0
    measures = json.loads((tmp_path / "eval.json").read_text())["comparisons"][0]["measures"]
    assert measures["lexical_relevance"]["per_prompt"] == [1, 1, 0]
    assert measures["words"]["difference"]["mean"] == 1
    assert measures["rouge_l"]["per_prompt"] == pytest.approx([0.8 - 0.5, 0.8 - 0.5, 0.8 - 1.0])


def test_messages_made_of_parts_are_their_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [{"role": "user", "content": [{"type": "text", "text": "the red "}, {"type": "text", "text": "cat"}]}]
    said = [{"role": "assistant", "content": [{"type": "text", "text": "the red cat"}]}]
    parts = write(tmp_path / "parts.jsonl", [{"prompt": asked, "completion": said}])
    assert evaluate("--answers", parts, "--output", tmp_path / "eval.json") == 0
    measures = json.loads((tmp_path / "eval.json").read_text())["results"][0]["measures"]
    assert measures["words"]["per_prompt"] == [3]
    assert measures["lexical_relevance"]["per_prompt"] == [1]
    film = [{"role": "user", "content": [{"type": "video", "video": "x"}]}]
    bad = write(tmp_path / "bad.jsonl", [{"prompt": film, "completion": "a"}])
    assert evaluate("--answers", bad) == 2
    assert "row 1: message 1 needs a role and a content that are text" in capsys.readouterr().err


def test_the_prompts_of_generate_are_found_again(tmp_path: Path) -> None:
    """As ``generate`` writes them: with the system prompt, parts joined, no null fields, split texts cut."""
    user = {"role": "user", "content": [{"type": "text", "text": "a red cat"}], "name": None}
    data = write(tmp_path / "data.jsonl", [{"prompt": [user], "references": ["a cat"]}])
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a red cat"}]
    answers = write(
        tmp_path / "answers.jsonl", [{"prompt": chat, "completion": [{"role": "assistant", "content": "cat"}]}]
    )
    out = tmp_path / "eval.json"
    asked = ("--answers", answers, "--output", out, "--data")
    assert evaluate(*asked, data, "--data.system_prompt", "be brief") == 0
    assert "rouge_l" in json.loads(out.read_text())["results"][0]["measures"]
    assert evaluate(*asked, data) == 2  # another prompt
    texts = write(tmp_path / "texts.jsonl", [{"prompt": "the red cat likes the blue bird"}])
    write(tmp_path / "answers.jsonl", [{"prompt": "the red cat likes", "completion": " the blue bird"}])
    assert evaluate(*asked, texts, "--data.split_text", "0.5") == 0
    assert json.loads(out.read_text())["results"][0]["measures"]["rouge_l"]["per_prompt"] == [1.0]


WORDS = ("cat", "dog", "bird")


def test_bad_input_is_one_sentence(room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start, data = str(room / "start"), str(room / "test.jsonl")
    model = ["--model", start, "--data", data, "--max_new_tokens", "6"]
    answers = str(write(tmp_path / "answers.jsonl", [{"prompt": "something else", "completion": "a"}]))
    empty = str(write(tmp_path / "empty.jsonl", [{"prompt": "the cat"}]))
    one = str(write(tmp_path / "one.jsonl", [{"prompt": "the cat", "completion": "a"}]))
    cases = {
        "Give either --model MODEL": ["--data", data],
        "not both": [*model, "--answers", answers],
        "--data FILE is missing": ["--model", start],
        "--against_answers goes with --answers": [*model, "--against_answers", answers],
        "compare --answers with another file": ["--answers", answers, "--against", start],
        "--samples 0: must be 1 or more": [*model, "--samples", "0"],
        "each once": [*model, "--temperatures", "1.0", "1.0"],
        "--temperatures -1": [*model, "--temperatures=-1"],
        "--batch_size 0": [*model, "--batch_size", "0"],
        "--sampling.top_p 2": [*model, "--sampling.top_p", "2"],
        "--markdown": [*model, "--markdown", str(tmp_path / "none" / "x.md")],
        "--against": [*model, "--against", str(tmp_path / "none")],
        "--judge_model": [*model, "--judge_model", str(tmp_path / "none")],
        "--checker": [*model, "--checker", "nothing"],
        "--follow_up_column next": [*model, "--judge_model", start, "--follow_up_column", "next"],
        "row 1: its prompt is not in": ["--answers", answers, "--data", data],
        "row 1: no answer in column 'completion'": ["--answers", empty],
        "both files must answer the same prompts": ["--answers", answers, "--against_answers", one],
        "No such file": ["--answers", str(tmp_path / "none.jsonl")],
    }
    for sentence, flags in cases.items():
        output = tmp_path / "out.json"
        assert evaluate(*flags, "--output", output) == 2, sentence
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cagsr eval: error:")]
        assert len(said) == 1
        assert sentence in said[0]
        assert not output.exists()
