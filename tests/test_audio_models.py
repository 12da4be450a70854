"""A model that hears: what is captured is what eager attention is, and what is decoded is what is scored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, Speech2TextConfig, Wav2Vec2Config, WhisperForConditionalGeneration

import listening
from cagsr.config import AttentionConfig, LoraConfig, ModelConfig, SalienceConfig, SamplingConfig
from cagsr.errors import ConfigError, ModelError
from cagsr.flow import EncodedPrompt, EpisodeBatch, Readings
from cagsr.models.hearing import Hearing
from cagsr.models.load import LoadedModel, load_model
from cagsr.models.sharing import shares_prompts
from cagsr.prompts.prepare import encode_texts
from cagsr.rollout.rows import prompt_batch
from cagsr.rollout.sample import sample_responses
from cagsr.scoring.answers import Response, answered
from cagsr.scoring.scorer import Scorer

TEXTS = ["", "the cat and the dog"]
ANSWERS = [[9, 12, 2], [20, 6, 7, 10, 2], [5, 2], [22, 23, 24, 2]]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(ModelConfig(str(listening.save_model(tmp_path_factory.mktemp("whisper"))), device="cpu"))


def encoded(loaded: LoadedModel) -> list[EncodedPrompt]:
    words = SalienceConfig(weighting="uniform", audio_seconds=0.2)
    return encode_texts(TEXTS, loaded.tokenizer, words, 30, audio=listening.CLIPS, vision=loaded.vision)


def two_answers_each(loaded: LoadedModel) -> EpisodeBatch:
    prompts = encoded(loaded)
    made = answered(loaded, [one for one in prompts for _ in range(2)], [Response("", tuple(a), True) for a in ANSWERS])
    return replace(made, prompts=prompt_batch(loaded, prompts, 2))


class Kept:
    """A visitor that keeps what it is handed, row by row."""

    def __init__(self) -> None:
        self.maps: dict[int, Tensor] = {}
        self.regions: dict[int, Tensor] = {}

    def visit(
        self, index: Tensor, part: EpisodeBatch, readings: Readings, attention: Tensor, regions: Tensor | None = None
    ) -> None:
        assert regions is not None
        for place, row in enumerate(index.tolist()):
            length, real = int(part.real[place].sum()), part.prompts.real[place]
            self.maps[row], self.regions[row] = attention[place, :length][:, real], regions[place, :length]


@pytest.mark.parametrize("share", [True, False], ids=["shared", "plain"])
def test_captured_equals_eager(loaded: LoadedModel, share: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Openings of 4 and 10 tokens, two answers to each, of other lengths; each alone in the eager model is the measure."""
    eager: Any = WhisperForConditionalGeneration.from_pretrained(loaded.path, attn_implementation="eager").eval()
    assert isinstance(loaded.vision, Hearing)
    episodes = two_answers_each(loaded)
    assert shares_prompts(loaded, episodes)
    monkeypatch.setattr("cagsr.scoring.scorer.shares_prompts", lambda *_: share)
    scorer = Scorer(loaded, AttentionConfig(layers="all"), SamplingConfig(), 8)
    encoder_rows: list[int] = []
    hook = loaded.model.get_encoder().register_forward_pre_hook(lambda _, args: encoder_rows.append(len(args[0])))
    kept = Kept()
    logprobs = scorer.policy(episodes, kept).logprobs
    hook.remove()
    assert encoder_rows == ([2] if share else [4])
    for row, answer in enumerate(ANSWERS):
        prompt = encoded(loaded)[row // 2]
        features = loaded.vision.inputs(prompt, torch.device("cpu")).tensors["input_features"]
        ids = torch.tensor([[*prompt.ids, *answer]])
        with torch.no_grad():
            output = eager(input_features=features, decoder_input_ids=ids, output_attentions=True, use_cache=False)
        width = len(prompt.ids)
        rows = slice(width - 1, width - 1 + len(answer))
        seen = torch.stack([one[0].mean(dim=0) for one in output.decoder_attentions]).mean(dim=0)[rows, :width]
        torch.testing.assert_close(kept.maps[row], seen, atol=2e-5, rtol=1e-4)
        looked = torch.stack([one[0].mean(dim=0) for one in output.cross_attentions]).mean(dim=0)[rows]
        assert looked.shape[1] == listening.STATES
        places = torch.tensor(prompt.places)
        by_hand = torch.stack([looked[:, places == one].sum(dim=1) for one in range(len(prompt.regions))], dim=1)
        assert float(looked.max()) > 3 / listening.STATES  # it listens somewhere
        torch.testing.assert_close(kept.regions[row][:, : by_hand.shape[1]], by_hand, atol=2e-5, rtol=1e-4)
        assert not kept.regions[row][:, by_hand.shape[1] :].any()
        said = output.logits[0, rows].log_softmax(dim=-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(logprobs[row, : len(answer)], said, atol=2e-4, rtol=1e-4)


def test_what_is_decoded_is_what_is_scored(loaded: LoadedModel) -> None:
    """Rows leave at other times; what the generation config forbids is never drawn, and corrected in scoring."""
    torch.manual_seed(3)
    found = sample_responses(loaded, prompt_batch(loaded, encoded(loaded), 4), SamplingConfig(max_new_tokens=8))
    assert len(set(found.lengths.tolist())) > 1
    never = torch.tensor(loaded.generation.never)
    assert not torch.isin(found.ids[found.sampled], never).any()
    assert not (found.ids[:, 0] == 2).any()
    readings = Scorer(loaded, AttentionConfig(), SamplingConfig(), 3).policy(found)
    assert found.decoded_logprobs is not None
    drawn = readings.logprobs - readings.sampling_correction
    torch.testing.assert_close(drawn, found.decoded_logprobs, atol=1e-4, rtol=1e-4)
    assert float(readings.sampling_correction.abs().max()) > 1e-3


def test_greedy_answers_are_those_of_whispers_own_generate(loaded: LoadedModel, tmp_path: Path) -> None:
    """The generation config that the model now has makes transformers open transcripts as we do."""
    assert isinstance(loaded.vision, Hearing)
    prompt = encoded(loaded)[0]
    found = sample_responses(loaded, prompt_batch(loaded, [prompt]), SamplingConfig(temperature=0, max_new_tokens=8))
    features = loaded.vision.inputs(prompt, torch.device("cpu")).tensors["input_features"]
    theirs = loaded.model.generate(features, max_new_tokens=8, do_sample=False)
    ours = found.ids[0].tolist()
    assert [one for one in theirs[0].tolist() if one not in prompt.ids][: len(ours)] == ours


def test_the_opening_is_chosen_and_said(tmp_path: Path) -> None:
    path = str(listening.save_model(tmp_path))
    german = load_model(ModelConfig(path, device="cpu", language="de", speech_task="translate"))
    assert isinstance(german.vision, Hearing)
    assert german.vision.opening == "<|startoftranscript|><|de|><|translate|><|notimestamps|>"
    assert german.vision.opening in " ".join(german.notes)
    kept: Any = german.model.generation_config
    assert (kept.language, kept.task, kept.forced_decoder_ids) == ("de", "translate", None)
    named: Any = load_model(ModelConfig(path, device="cpu", language="German")).vision
    assert named.opening.startswith("<|startoftranscript|><|de|><|transcribe|>")
    with pytest.raises(
        ModelError, match=r"its tokenizer has no <\|fr\|>, which should open transcripts \(--model.language"
    ):
        load_model(ModelConfig(path, device="cpu", language="fr"))
    settings = GenerationConfig.from_pretrained(path)
    settings.is_multilingual, settings.forced_decoder_ids = False, [[1, settings.no_timestamps_token_id]]
    settings.save_pretrained(path)
    english: Any = load_model(ModelConfig(path, device="cpu")).vision
    assert english.opening == "<|startoftranscript|><|notimestamps|>"
    with pytest.raises(ConfigError, match=r"^--model.language de: .* writes down English alone\.$"):
        load_model(ModelConfig(path, device="cpu", language="de"))


def test_models_that_are_not_read_are_refused(tmp_path: Path) -> None:
    for config in (Speech2TextConfig(), Wav2Vec2Config()):
        config.save_pretrained(tmp_path)
        save_file({}, tmp_path / "model.safetensors")
        with pytest.raises(ModelError, match=f"how {config.model_type} models read sound isn't known here"):
            load_model(ModelConfig(str(tmp_path), device="cpu"))


def test_adapters_train_and_load(loaded: LoadedModel, tmp_path: Path) -> None:
    adapted = load_model(ModelConfig(loaded.path, device="cpu"), LoraConfig(r=2))
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    episodes = two_answers_each(adapted)
    assert shares_prompts(adapted, episodes)
    before = Scorer(adapted, AttentionConfig(), SamplingConfig(), 8).policy(episodes).logprobs
    adapted.model.save_pretrained(tmp_path)
    merged = load_model(ModelConfig(str(tmp_path), device="cpu"), for_training=False)
    after = Scorer(merged, AttentionConfig(), SamplingConfig(), 8).policy(episodes).logprobs
    torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-3)
