"""Prompts with sounds: how rows are read, what is refused, and regions of time with numbers worked out by hand."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import listening
from cagsr.config import DataConfig, ModelConfig, SalienceConfig
from cagsr.errors import ConfigError, DataError
from cagsr.evaluation.transcripts import word_accuracy, word_errors
from cagsr.flow import (
    Attention,
    EncodedPrompt,
    EpisodeBatch,
    ImageInputs,
    Picture,
    Prompt,
    PromptBatch,
    Readings,
    RewardBatch,
    Sound,
)
from cagsr.models.load import LoadedModel, load_model
from cagsr.models.sounds import as_data_url
from cagsr.prompts.prepare import encode_texts, prepare_prompts
from cagsr.prompts.time_regions import even_spans, loudness
from cagsr.reward.terms.audio_coverage import AudioCoverage, AudioCoverageConfig
from cagsr.reward.terms.image_coverage import ImageCoverage, ImageCoverageConfig

WORDS = SalienceConfig(weighting="uniform", audio_seconds=0.2)
OPENING = listening.OPENING
pytest.importorskip("soundfile")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(ModelConfig(str(listening.save_model(tmp_path_factory.mktemp("whisper"))), device="cpu"))


def read(loaded: LoadedModel, folder: Path, rows: Sequence[dict[str, Any]], **settings: Any) -> list[EncodedPrompt]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(path=str(path), **settings)
    return list(prepare_prompts(data, WORDS, loaded.tokenizer, max_length=30, vision=loaded.vision).prompts)


def one(loaded: LoadedModel, folder: Path, **row: Any) -> EncodedPrompt:
    return read(loaded, folder, [row])[0]


def write(folder: Path, samples: np.ndarray, name: str = "a.wav", rate: int = listening.RATE) -> str:
    import soundfile

    soundfile.write(folder / name, samples, rate)
    return name


def test_a_row_may_name_its_sound_in_every_usual_way(loaded: LoadedModel, tmp_path: Path) -> None:
    tone = listening.sound((400, 0.3))
    name = write(tmp_path, tone, "a.flac")
    url = as_data_url(tone, listening.RATE)
    text = {"type": "text", "text": ""}
    found = read(
        loaded,
        tmp_path,
        [
            {"prompt": "", "audio": name},
            {"audio": name},
            {"prompt": "", "audio": [str(tmp_path / name)]},
            {"prompt": "", "audio": url},
            {"prompt": "", "audio": {"array": tone.tolist(), "sampling_rate": listening.RATE}},
            {"prompt": "", "audio": {"bytes": None, "path": name}},
            {"prompt": [{"role": "user", "content": [{"type": "audio", "path": name}, text]}]},
            {"prompt": [{"role": "user", "content": [{"type": "audio", "audio": name}]}]},
            {"prompt": [{"role": "user", "content": [{"type": "audio", "url": url}]}]},
            {"prompt": [{"role": "user", "content": [
                {"type": "input_audio", "input_audio": {"data": url.partition(",")[2], "format": "wav"}}]}]},
            {"messages": [{"role": "user", "content": [{"type": "audio", "path": name}]},
                          {"role": "assistant", "content": "the cat"}]},
        ],
    )  # fmt: skip
    assert {one.prompt.text for one in found} == {OPENING}
    assert {one.places for one in found} == {(0,) * 10 + (1,) * 5 + (-1,) * 35}
    assert all(
        one.regions == found[0].regions or abs(one.regions[0].weight - found[0].regions[0].weight) < 1e-3
        for one in found
    )
    assert found[-1].prompt.columns["completion"][0]["content"] == "the cat"


def test_sounds_of_datasets_stay_files(loaded: LoadedModel, tmp_path: Path) -> None:
    """A parquet file with an Audio feature: its bytes are read when the prompt is, by no other decoder."""
    from datasets import Audio, Dataset, Features, Value

    name = write(tmp_path, listening.sound((400, 0.3)))
    held = {"bytes": Value("binary"), "path": Value("string")}
    rows = {"prompt": [""], "audio": [{"bytes": (tmp_path / name).read_bytes(), "path": None}]}
    made = Dataset.from_dict(rows, features=Features({"prompt": Value("string"), "audio": held}))
    made.cast_column("audio", Audio(decode=False)).cast_column("audio", Audio()).to_parquet(tmp_path / "rows.parquet")
    data = DataConfig(path=str(tmp_path / "rows.parquet"))
    (found,) = prepare_prompts(data, WORDS, loaded.tokenizer, max_length=30, vision=loaded.vision).prompts
    assert isinstance(found.prompt.sounds[0].source, bytes)
    assert len(found.regions) == 2


def test_other_rates_are_resampled_and_channels_mixed(loaded: LoadedModel, tmp_path: Path) -> None:
    slow = listening.sound((440, 0.5), rate=8000)
    name = write(tmp_path, np.stack([slow, -slow / 2], axis=1), rate=8000)
    assert loaded.vision is not None
    device = loaded.device
    found = loaded.vision.inputs(one(loaded, tmp_path, audio=name), device)
    same = encode_texts([""], loaded.tokenizer, WORDS, 30, audio=[{"array": listening.sound((440, 0.5)) / 4,
                        "sampling_rate": listening.RATE}], vision=loaded.vision)[0]  # fmt: skip
    expected = loaded.vision.inputs(same, device)
    assert found is not None
    assert expected is not None
    off = (found.tensors["input_features"] - expected.tensors["input_features"]).abs()
    assert float(off[..., 5:45].max()) < 0.05


def test_what_opens_the_transcript(loaded: LoadedModel, tmp_path: Path) -> None:
    name = write(tmp_path, listening.sound((400, 0.3)))
    plain, named, whole = read(
        loaded,
        tmp_path,
        [
            {"audio": name, "prompt": ""},
            {"audio": name, "prompt": "the cat"},
            {"audio": name, "prompt": "<|startoftranscript|><|de|><|transcribe|><|notimestamps|>"},
        ],
    )
    vocabulary = loaded.tokenizer.get_vocab()
    opening = tuple(
        vocabulary[mark] for mark in ("<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")
    )
    assert plain.ids == opening
    assert plain.words == (-1,) * 4
    assert named.ids == (vocabulary["<|startofprev|>"], vocabulary["the"], vocabulary["cat"], *opening)
    assert named.words == (-1, 0, 1, -1, -1, -1, -1)
    assert named.prompt.given == "the cat"
    assert whole.ids == (opening[0], vocabulary["<|de|>"], *opening[2:])


def test_spans_of_the_users_own(loaded: LoadedModel, tmp_path: Path) -> None:
    """States stand at 0, 20, 40 ms, ...: one span holds those at 100 to 180 ms, the smaller one within it 140 and 160."""
    name = write(tmp_path, listening.sound((400, 0.4)))
    found = one(loaded, tmp_path, audio=name, spans=[[0.1, 0.19], [0.13, 0.17]])
    assert found.places == (-1,) * 5 + (0, 0, 1, 1, 0) + (-1,) * 40
    assert [(region.left, region.right) for region in found.regions] == [
        pytest.approx((0.25, 0.475)), pytest.approx((0.325, 0.425))
    ]  # fmt: skip
    speck = one(loaded, tmp_path, audio=name, spans=[[0.305, 0.311]])  # between two states: the nearer one's
    assert speck.places.index(0) == 15
    with pytest.raises(DataError, match=r"row 1: the span \[0.1, 0.9\] does not lie in the sound of 0.40 seconds"):
        one(loaded, tmp_path, audio=name, spans=[[0.1, 0.9]])
    with pytest.raises(DataError, match=r"column 'spans' of a row with a sound must hold"):
        one(loaded, tmp_path, audio=name, spans=[3])


def test_stretches_of_time_by_hand(loaded: LoadedModel, tmp_path: Path) -> None:
    assert even_spans(0.5, 0.2) == ((0.0, 0.2), (0.2, 0.4), (0.4, 0.5))
    assert np.allclose(even_spans(0.6, 0.2), [(0.0, 0.2), (0.2, 0.4), (0.4, 0.6)])
    found = one(loaded, tmp_path, audio=write(tmp_path, listening.sound((400, 0.24), (0, 0.16))))
    assert found.places == (0,) * 10 + (1,) * 10 + (-1,) * 30  # 50 states a second, what fills up the rest in none
    # 0.16 s of the last 0.2 are silent
    assert [one.weight for one in found.regions] == pytest.approx([1, 0.2], abs=0.01)


def test_loudness_by_hand() -> None:
    """Frames of 20 ms, 4 samples each: full scale, a tenth (20 dB less, so a third), a hundredth (40 dB less: silence), nothing."""
    frame = np.array([1, -1, 1, -1], dtype=np.float32)
    samples = np.concatenate([frame, frame / 10, frame / 100, 0 * frame])
    spans = [(0, 0.02), (0.02, 0.04), (0.04, 0.06), (0.06, 0.08), (0, 0.08)]
    assert loudness(samples, 200, spans) == pytest.approx([1, 1 / 3, 0, 0, 1 / 3])
    assert loudness(samples[:2], 200, [(0, 0.005), (0.005, 0.01)]) == [1, 1]  # shorter than a frame: the nearest
    assert loudness(0 * samples, 200, spans) == [1.0] * 5  # nothing sounds
    assert loudness(samples / 1000, 200, spans[:2]) == [1.0] * 2  # under -55 dB of full scale nothing does
    steady = np.concatenate([frame + 7, 0 * frame])  # a constant is no sound
    assert loudness(steady, 200, spans[:2]) == pytest.approx([1, 0])


def test_unusable_rows_get_one_sentence(loaded: LoadedModel, tmp_path: Path) -> None:
    name = write(tmp_path, listening.sound((400, 0.3)))
    (tmp_path / "text.wav").write_text("no sound")
    write(tmp_path, np.zeros(0), "empty.wav")
    long = write(tmp_path, listening.sound((400, 1.2)), "long.wav")
    for row, told in (
        ({"prompt": "the cat"}, "row 1: the prompt has no sound, and a model that hears answers one"),
        ({"audio": [name, name]}, "row 1: the prompt has 2 sounds"),
        ({"audio": "b.wav"}, r"row 1, sound \(b.wav\): there is no such sound file; its path counts from"),
        ({"audio": "text.wav"}, r"row 1, sound \(text.wav\): the sound can't be read \(.*\); convert it to WAV"),
        ({"audio": "empty.wav"}, r"row 1, sound \(empty.wav\): the sound is empty"),
        ({"audio": "data:audio/wav;base64,???"}, "row 1, sound: its data URL holds no base64"),
        ({"audio": "data:audio/wav;base64," + base64.b64encode(b"RIFF").decode()}, "row 1, sound: the sound can't be read"),
        ({"audio": "https://example.org/a.wav"}, "is not on this machine; download it and give the file's path"),
        ({"audio": 3}, "row 1, sound: a sound is a file's path or samples"),
        ({"audio": {"array": [0.1, float("nan")], "sampling_rate": 16000}}, "the sound holds what is no number"),
        ({"audio": long}, r"row 1: the sound lasts 1.2 seconds, and the model hears 1; a sound is never cut here"),
        ({"audio": name, "images": ["a.png"]}, "row 1: the prompt has images, which nothing reads here"),
        ({"audio": name, "prompt": 3.5}, None),
        ({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "audio": name}, "no conversation"),
        ({"audio": name, "prompt": [{"role": "user", "content": [{"type": "audio", "path": name}]}]}, "give each sound once"),
    ):  # fmt: skip
        if told is None:
            one(loaded, tmp_path, **row)  # a number in a text column is its digits
            continue
        with pytest.raises(DataError, match=told):
            one(loaded, tmp_path, **row)
    with pytest.raises(DataError, match="a sound is never cut"):
        read(loaded, tmp_path, [{"audio": long}], long_prompts="truncate")
    kept = read(loaded, tmp_path, [{"audio": name}, {"audio": long}], long_prompts="drop")
    assert [one.prompt.row for one in kept] == [1]
    with pytest.raises(DataError, match=r"all 1 prompts are longer than 30 tokens or 1 seconds and were dropped"):
        read(loaded, tmp_path, [{"audio": long}], long_prompts="drop")
    with pytest.raises(ConfigError, match=r"--data\.spans_column spans"):
        read(loaded, tmp_path, [{"audio": name, "spans": [[0, 0.1]]}], spans_column="spans")


def test_a_model_that_reads_text_refuses_sounds(tmp_path: Path) -> None:
    import tiny

    told = "row 1: the prompt has a sound, which nothing reads here"
    with pytest.raises(DataError, match=told):
        encode_texts(["the cat"], tiny.tokenizer(), WORDS, 30, audio=[listening.CLIPS[0]])


def test_the_term_by_hand() -> None:
    """Stretches weigh 3/4 and 1/4; tau 0.3: 0.15 covers the first by half, 0.6 the second wholly: 3/8 + 1/4 = 5/8."""
    regions = torch.tensor([[[0.15, 0.0], [0.1, 0.6], [0.0, 0.0]], [[0.9, 0.9]] * 3])
    real, ids = torch.tensor([[True, True, True], [True, True, False]]), torch.zeros(2, 3, dtype=torch.int64)
    heard = ImageInputs({}, True, -1, torch.tensor([0, 1, -1]), torch.tensor([3.0, 1.0]))
    asked = (Prompt(1, "", sounds=(Sound("a.wav", "a"),)), Prompt(2, "", images=(Picture("a.png", "a"),)))
    prompts = PromptBatch(asked, ids, real, ids - 1, torch.zeros(2, 0), torch.tensor([0, 1]), (heard, heard))
    episodes = EpisodeBatch.of_one_turn(prompts, ids, real, torch.ones(2, dtype=torch.bool), ("", ""))
    zeros = torch.zeros(2, 3)
    attention = Attention(torch.zeros(2, 3, 3), torch.zeros(2, 3, 0), regions)
    batch = RewardBatch(episodes, Readings(zeros, zeros, zeros, zeros), None, attention)
    found = AudioCoverage(AudioCoverageConfig())(batch)
    assert found.applies.tolist() == [True, False]  # the other is an image's business
    assert found.values[0] == pytest.approx(5 / 8)
    dense = AudioCoverage(AudioCoverageConfig(dense=True))(batch)
    assert dense.values[0].tolist() == pytest.approx([3 / 8, 1 / 4, 0])
    assert ImageCoverage(ImageCoverageConfig())(batch).applies.tolist() == [False, True]
    silent = replace(batch, attention=replace(attention, regions=None))
    assert not AudioCoverage(AudioCoverageConfig())(silent).applies.any()


def test_word_errors_by_hand() -> None:
    """``the cat sees a dog``: the answer adds ``big``, leaves out ``sees`` and says ``bird`` for ``dog``."""
    pytest.importorskip("jiwer")
    answers = ["Big, the cat a bird!", "the cat sees a dog", "", "anything"]
    rows = ["the cat sees a dog", ["no", "The cat sees a dog."], "the cat sees a dog", ""]
    found = word_errors([""] * 4, answers, reference=rows)
    assert found[0] == {"word_error_rate": 3 / 5, "skipped_words": 1, "invented_words": 1, "changed_words": 1}
    assert set(found[1].values()) == {0.0}  # the reference that fits best
    assert found[2] == {"word_error_rate": 1, "skipped_words": 5, "invented_words": 0, "changed_words": 0}
    assert set(found[3].values()) == {None}
    assert word_accuracy([""] * 4, answers, reference=rows) == [pytest.approx(2 / 5), 1, 0, None]
    with pytest.raises(DataError, match="the rows have none of the columns references, reference, completion"):
        word_errors([""], ["a"], text=["a"])
