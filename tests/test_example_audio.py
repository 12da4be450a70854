"""The generated world of sounds: words are the tones they should be, and the transcriber is careless as he says."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from examples.audio import start, write
from examples.audio.floor import random_reward
from examples.audio.world import HABIT, NAMES, RATE, SECONDS, STOCK, TONES, Word, clip_of, rows, sound

from cagsr.commands.main import main
from cagsr.compare.make_models import reward_settings
from cagsr.compare.plan import read_plan
from cagsr.config import validate
from cagsr.evaluation.transcripts import word_errors

ROOT = Path(__file__).parents[1]
pytest.importorskip("soundfile")
pytest.importorskip("jiwer")


def test_sets_never_meet_and_no_clip_is_too_long() -> None:
    sets = {part: {row["reference"] for _, row in rows(part, 60, 0)} for part in ("pairs", "prompts", "test")}
    assert [len(own) for own in sets.values()] == [60, 60, 60]
    assert not sets["pairs"] & sets["prompts"] | sets["prompts"] & sets["test"] | sets["pairs"] & sets["test"]
    longest = max(clip_of([*NAMES[:6]], random.Random(seed))[-1].end for seed in range(200))
    assert longest + 0.1 < SECONDS


def test_the_transcriber_leaves_out_more_than_he_invents() -> None:
    made = [row for _, row in rows("pairs", 600, 0)]
    found = word_errors([], [row["completion"] for row in made], reference=[row["reference"] for row in made])
    mean = {name: float(np.mean([one[name] or 0.0 for one in found])) for name in found[0]}
    # 4.5 words on the average, of which he says 2.2 and his own in a quarter of the transcripts.
    assert 1.6 < mean["skipped_words"] < 2.6
    assert mean["invented_words"] + mean["changed_words"] == pytest.approx(HABIT, abs=0.08)
    own = np.mean([row["completion"].split().count(STOCK) > row["reference"].split().count(STOCK) for row in made])
    assert own == pytest.approx(HABIT, abs=0.06)


def test_a_word_sounds_when_and_as_it_should() -> None:
    samples = sound((Word("ash", 0.1, 0.2, 0.3),), "a")
    low, high = (samples[round(first * RATE) : round((first + 0.1) * RATE)] for first in (0.1, 0.2))
    loudest = [float(np.abs(np.fft.rfft(part)).argmax() * RATE / len(part)) for part in (low, high)]
    assert loudest == [pytest.approx(hertz, rel=0.05) for hertz in TONES["ash"]]
    assert np.abs(samples[: round(0.099 * RATE)]).max() < 0.02 < 0.14 < np.abs(low).max()
    states = start.sounding([("ash", 0.1, 0.3)])
    assert states.nonzero().flatten().tolist() == list(range(5, 15))  # 50 states a second
    assert set(states.tolist()) == {0, 1}


def test_the_floor_says_nothing_and_always_the_same() -> None:
    first, second, third = random_reward([], [" ash", " ash", " elm"], ["a.wav", "b.wav", "a.wav"])
    assert len({first, second, third}) == 3
    assert random_reward([], [" ash"], ["a.wav"]) == [first]


def test_a_model_learns_transcripts_and_is_trained_on_clips_without(tmp_path: Path) -> None:
    write.main(write.Options(tmp_path, pairs=16, prompts=6, held_out=2, test=2))
    start.main(start.Options(tmp_path, tmp_path / "start", hearing=2, epochs=1, batch_size=8))
    how = {
        "config": ROOT / "examples/audio/settings.yaml", "model.path": tmp_path / "start", "model.device": "cpu",
        "data.path": tmp_path / "prompts.jsonl", "evaluation.path": tmp_path / "held_out.jsonl",
        "output_dir": tmp_path / "run", "reward.audio_coverage.weight": 1, "run.steps": 1, "run.batch_size": 2,
        "sampling.num_generations": 2, "sampling.max_new_tokens": 4, "evaluation.held_out": 2, "evaluation.every": 1,
    }  # fmt: skip
    assert main(["train", *(str(part) for name, value in how.items() for part in (f"--{name}", value))]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < metrics["rewards/audio_coverage/mean"] <= 1
    assert metrics["eval/metric"] <= 1


@pytest.mark.parametrize("fast", [False, True])
def test_the_plan_can_be_read(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = read_plan(ROOT / "examples" / "audio" / "audio.yaml", fast=fast)
    for method in plan.methods:
        validate(reward_settings(plan, method, 0))
