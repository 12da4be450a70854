"""Prompts with sounds through the commands: trained on, sampled, scored, seen, judged, and refused in one sentence."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import WhisperForConditionalGeneration

import listening
from cagsr.commands.main import main
from cagsr.config import ModelConfig, SalienceConfig
from cagsr.models.load import load_model
from cagsr.view import view

pytest.importorskip("soundfile")
pytest.importorskip("jiwer")


def flags(**values: Any) -> list[str]:
    return [str(part) for name, value in values.items() for part in (f"--{name.replace('__', '.')}", value)]


def test_the_whole_loop_trains_and_what_it_saves_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listening.save_model(tmp_path / "model")
    rows = listening.save_rows(tmp_path, 6, ("", "the cat"), reference="the cat sees a dog")
    run = tmp_path / "run"
    stretches = flags(salience__weighting="uniform", salience__audio_seconds=0.1)
    how = flags(
        model__path=tmp_path / "model", model__device="cpu", data__path=rows, output_dir=run, run__steps=2, run__batch_size=2,
        sampling__num_generations=2, sampling__max_new_tokens=4, evaluation__held_out=1, reward__audio_coverage__weight=1,
        evaluation__metric="cagsr.evaluation.transcripts.word_accuracy", ppo__num_ppo_epochs=1, ppo__estimator="rloo",
        run__sample_rows=1,
    )  # fmt: skip
    assert main(["train", *how, *stretches]) == 0
    assert "answers are written behind <|startoftranscript|><|en|>" in capsys.readouterr().out.replace("\n", "")
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, last = [one for one in logged if "val/ratio_first_error" in one]
    assert 0 < first["rewards/audio_coverage/mean"] <= 1
    assert first["scoring/shared_prompt_logp_difference"] < 1e-3
    assert first["val/ratio_first_error"] < 1e-4
    assert abs(first["objective/kl"]) < 1e-4 < abs(last["objective/kl"])  # the reference stays what it was
    trained = WhisperForConditionalGeneration.from_pretrained(run / "final")
    started = WhisperForConditionalGeneration.from_pretrained(tmp_path / "model")
    moved = {
        name
        for (name, one), other in zip(trained.named_parameters(), started.parameters(), strict=True)
        if (one != other).any()
    }
    assert any("encoder.layers" in name for name in moved)
    assert any("encoder_attn" in name for name in moved)
    assert {"preprocessor_config.json", "tokenizer.json"} <= {file.name for file in (run / "final").iterdir()}

    out, where = tmp_path / "elsewhere", flags(model__path=run / "final", model__device="cpu")
    out.mkdir()
    few, pays = flags(sampling__max_new_tokens=4, sampling__num_generations=2), flags(reward__audio_coverage__weight=1)
    made, scored = out / "made.jsonl", out / "scored.jsonl"
    assert main(["generate", *where, *few, *flags(data__path=rows, output=made)]) == 0
    written = [json.loads(line) for line in made.read_text().splitlines()]
    assert [row["prompt"] for row in written[:4]] == ["", "", "the cat", "the cat"]
    said = [{**row, "completion": row["completion"] or "the cat"} for row in written]
    made.write_text("".join(json.dumps(row) + "\n" for row in said))
    assert main(["score", *where, *pays, *stretches, *flags(data__path=made, output=scored)]) == 0
    assert all(0 < json.loads(line)["terms"]["audio_coverage"] <= 1 for line in scored.read_text().splitlines())
    assert main(["rank", *where, *few, *pays, *stretches, *flags(data__path=rows, output=out / "ranked.jsonl")]) == 0
    checked = flags(answers=made, data__path=rows, checker="cagsr.evaluation.transcripts.word_errors")
    capsys.readouterr()
    assert main(["eval", *checked]) == 0
    assert re.search(r"skipped_words\s*│\s*[0-9.]+", capsys.readouterr().out)
    diagnosed = flags(data__path=rows, output=out / "d.html", sampling__max_new_tokens=4, data__limit=4)
    assert main(["diagnose", *where, *pays, *stretches, *diagnosed]) == 0
    page = out / "page.html"
    assert main(["view", *where, *pays, *stretches, *flags(data__path=made, row=3, out=page)]) == 0
    (tmp_path / "a.wav").write_bytes(
        base64.b64decode(json.loads(rows.read_text().splitlines()[0])["audio"].partition(",")[2])
    )
    typed = ["--prompt", "", *flags(audio=tmp_path / "a.wav", sampling__max_new_tokens=3)]
    assert main(["generate", *where, *typed]) == 0
    capsys.readouterr()
    for command, told in (
        (["generate", *where, *flags(data__path=rows, audio="a.wav")], "--audio belongs to --prompt"),
        (["sft", *where, *flags(data__path=made, output_dir=out / "sft")], "hears, and sft trains on texts"),
        (["export", *flags(model=run / "final", output=out / "x", format="onnx")], "--format onnx"),
        (["train", *how, *flags(output_dir=out / "r", reward__image_coverage__weight=1)], "has an image"),
        (["train", *how, *flags(output_dir=out / "r", rollout__engine="vllm")], "--rollout.engine vllm"),
        (["train", *how, *flags(output_dir=out / "r", rollout__task="cagsr.tasks.task.Once")], "prompts of .* have sounds"),
        (["train", *how, *flags(output_dir=out / "r", steps__by="lines")], "--steps.by"),
    ):  # fmt: skip
        assert main(command) == 2, command
        assert re.search(told, capsys.readouterr().err.replace("\n", " ")), command
    assert not {"sft", "x", "r"} & {file.name for file in out.iterdir()}


def test_the_page_shows_and_plays_the_sound(browser: Any, tmp_path: Path) -> None:
    loaded = load_model(ModelConfig(str(listening.save_model(tmp_path / "m")), device="cpu"), for_training=False)
    words = SalienceConfig(weighting="uniform", audio_seconds=0.2)
    answers = ["the red cat likes a dog", "a small bird"]
    found = view(loaded, "", answers, salience=words, audio=listening.CLIPS[0])
    best = found.measured.answers[0].regions
    assert best is not None
    assert best.shape[1] == 4
    complaints: list[str] = []
    page = browser.new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or complaints.append(request.url))
    page.goto(found.save(tmp_path / "page.html").as_uri())
    page.wait_for_selector("body[data-ready]")
    page.wait_for_function("() => document.querySelector('audio').readyState > 0")
    assert page.evaluate("() => document.querySelector('audio').duration") == pytest.approx(0.7, abs=0.01)
    boxes = page.evaluate(
        "() => { const all = document.querySelector('#images img').getBoundingClientRect();"
        " return [...document.querySelectorAll('.region')].map(one => { const box = one.getBoundingClientRect();"
        " return [(box.left - all.left) / all.width, (box.right - all.left) / all.width, box.height / all.height]; }) }"
    )
    by_hand = [[0, 2 / 7, 1], [2 / 7, 4 / 7, 1], [4 / 7, 6 / 7, 1], [6 / 7, 1, 1]]
    assert np.abs(np.array(boxes) - by_hand).max() < 0.01
    page.locator(".answer[data-answer='0'] .tokens .t").nth(1).hover()
    spot = int(best[1].argmax())
    told = page.locator("#status").inner_text()
    assert f"Of the sound most at {0.2 * spot:.2f} to {min(0.7, 0.2 * spot + 0.2):.2f} s" in told
    assert complaints == []
    page.close()


def test_a_long_sound_is_played_with_fewer_samples() -> None:
    from cagsr.view.sound_strip import ROOM, playable

    short, long = (playable(np.zeros(seconds * 16000, dtype=np.float32), 16000) for seconds in (10, 30))
    rates = [int.from_bytes(base64.b64decode(one.partition(",")[2])[24:28], "little") for one in (short, long)]
    assert rates == [16000, 8000]
    assert max(len(short), len(long)) <= ROOM + 100
