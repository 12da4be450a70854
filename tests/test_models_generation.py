"""What a model's generation config asks for: honoured, switched off or refused, and served as it was trained."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import tiny
from cagsr.commands.main import main
from cagsr.config import DataConfig, LoraConfig, ModelConfig, RolloutConfig, SamplingConfig, TrainConfig
from cagsr.errors import ConfigError, ModelError
from cagsr.flow import Prompt, PromptBatch
from cagsr.models import generation
from cagsr.models.generation import GenerationRules, decoder_prefix, generation_notes, sampled_with
from cagsr.models.load import LoadedModel, load_model
from cagsr.rollout.sample import sample_responses
from cagsr.rollout.sampler import build_sampler
from cagsr.runs.final import save_final
from cagsr.runs.saved import answers_probe
from cagsr.scoring.statistics import sampling_correction
from scored import scored, scored_with_maps

FORCED = 3
"""A token that is no word, as a language token is not."""

PUBLISHED: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 3,
    "top_p": 0.5,
    "max_length": 9,
    "min_length": 4,
    "repetition_penalty": 1.7,
    "no_repeat_ngram_size": 2,
    "num_beams": 2,
    "early_stopping": True,
    "length_penalty": 2.0,
    "typical_p": 0.5,
    "min_p": 0.2,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "exponential_decay_length_penalty": [2, 1.5],
    "sequence_bias": [[[7], -5.0]],
    "forced_eos_token_id": 2,
    "bad_words_ids": [[8], [9, 10]],
    "suppress_tokens": [11],
    "begin_suppress_tokens": [2],
}
"""Much of what published generation configs hold."""


def loaded_with(folder: Path, kind: str, settings: dict[str, Any], lora: LoraConfig | None = None) -> LoadedModel:
    tiny.save_model(folder, kind)
    stored = json.loads((folder / "generation_config.json").read_text())
    stored.pop("_from_model_config")  # as published ones have it
    (folder / "generation_config.json").write_text(json.dumps(stored | settings))
    return load_model(ModelConfig(str(folder), device="cpu"), lora)


def batch_of(loaded: LoadedModel, texts: list[str], answers: int = 1) -> PromptBatch:
    rows = [text for text in texts for _ in range(answers)]
    encoded = loaded.tokenizer(rows, return_tensors="pt", padding=True, padding_side=loaded.architecture.padding_side)
    count = len(rows)
    return PromptBatch(
        tuple(Prompt(row, text) for row, text in enumerate(rows, 1)),
        encoded.input_ids,
        encoded.attention_mask.bool(),
        torch.full_like(encoded.input_ids, -1),
        torch.ones(count, 1),
        torch.arange(len(texts)).repeat_interleave(answers),
    )


PROMPTS = ["tell me about the red cat", "a dog"]


# ---- the table ----


def test_every_field_of_transformers_is_in_the_table_once() -> None:
    tables = [set(generation.HONOURED), set(generation.SETTINGS), set(generation.OFF), set(generation.INERT)]
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert known <= set.union(*tables), "new fields: decide what is done with them"
    assert sum(len(table) for table in tables) == len(set.union(*tables))
    assert not set(generation.REFUSED) & set.union(*tables)


def test_what_is_set_is_named_and_what_is_neutral_is_not(tmp_path: Path) -> None:
    loaded = loaded_with(tmp_path, "llama", PUBLISHED)
    rules = loaded.generation
    assert rules.never == (8, 11)
    assert rules.never_first == (2,)
    assert rules.off["bad_words_ids"] == [[9, 10]]
    notes = " ".join(generation_notes(loaded, SamplingConfig(top_k=3)))
    for name in PUBLISHED.keys() - {"do_sample", "suppress_tokens", "begin_suppress_tokens", "top_k"}:
        assert name in notes, name
    assert "top_k" not in notes  # the same as the setting
    assert "3 token(s) that it forbids" in notes
    neutral = {name: values[0] for name, values in generation.OFF.items() if values} | {"suppress_tokens": []}
    settings = GenerationConfig(**neutral, eos_token_id=2)
    assert (
        generation.read_generation_rules(settings, encoder_decoder=False, stop_ids=(2,), path="x") == GenerationRules()
    )


def test_a_field_that_the_table_does_not_know_is_switched_off_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"repetition_penalty": 1.5, "chat_format": "chatml"}
    off = {name: values for name, values in generation.OFF.items() if name != "repetition_penalty"}
    monkeypatch.setattr(generation, "OFF", off)  # as if a newer transformers had brought it
    loaded = loaded_with(tmp_path, "llama", settings)
    assert loaded.generation.off == {"repetition_penalty": 1.5}
    notes = generation_notes(loaded, SamplingConfig())
    assert any("switched off: repetition_penalty 1.5" in note for note in notes)
    assert any("chat_format means nothing to transformers" in note for note in notes)
    served = generation.served_with(loaded, SamplingConfig())
    assert served.repetition_penalty is None
    assert served.chat_format == "chatml"


@pytest.mark.parametrize(
    ("kind", "settings", "part"),
    [
        ("bart", {"decoder_start_token_id": [2, 3]}, "several decoder_start_token_id"),
        ("bart", {"forced_bos_token_id": 2}, "forces token 2 at the start of every answer"),
        ("llama", {"forced_decoder_ids": [[1, 5]]}, "sets forced_decoder_ids"),
    ],
)
def test_what_can_not_be_trained_with_is_refused_by_name(
    kind: str, settings: dict[str, Any], part: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=part):
        loaded_with(tmp_path, kind, settings)


# ---- tokens that are forbidden ----


def test_forbidden_tokens_are_not_sampled_and_the_correction_is_the_mass_that_is_left(tmp_path: Path) -> None:
    settings = {"suppress_tokens": [11], "bad_words_ids": [[8], [2]], "begin_suppress_tokens": [9]}
    loaded = loaded_with(tmp_path, "llama", settings)
    assert loaded.generation.never == (8, 11), "a stop token is no bad word to transformers"
    torch.manual_seed(0)
    rollout = sample_responses(loaded, batch_of(loaded, PROMPTS, 100), SamplingConfig(max_new_tokens=6))
    sampled = rollout.ids[rollout.sampled]
    assert not torch.isin(sampled, torch.tensor([8, 11])).any()
    assert not (rollout.ids[:, 0] == 9).any()
    assert (sampled == 9).any()
    correction = sampling_correction(SamplingConfig(), (2,), loaded.generation)
    mass = correction(torch.zeros(2, 28), torch.tensor([0, 1]))
    assert mass.tolist() == pytest.approx([math.log(25 / 28), math.log(26 / 28)], abs=1e-6)
    readings = scored(loaded, rollout, micro_batch_size=64)
    assert (readings.sampling_correction[rollout.sampled] < 0).all()


def test_vllm_is_not_told_of_them_so_it_is_refused(tmp_path: Path) -> None:
    config = TrainConfig(ModelConfig("m"), DataConfig("d"), output_dir="o", rollout=RolloutConfig(engine="vllm"))
    forbids = loaded_with(tmp_path / "a", "llama", {"suppress_tokens": [11]})
    with pytest.raises(ConfigError, match=r"forbids tokens .suppress_tokens.*use transformers"):
        build_sampler(config, forbids, None)  # type: ignore[arg-type]
    untied = loaded_with(tmp_path / "b", "gemma3", {}, LoraConfig(r=2, target_modules="lm_head"))
    with pytest.raises(ConfigError, match="make two matrices of one"):
        build_sampler(config, untied, None)  # type: ignore[arg-type]


# ---- a first token that is forced ----


@pytest.mark.parametrize("kind", ["bart", "mbart"])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_forced_first_token_is_read_and_neither_sampled_nor_scored(kind: str, rank: int, tmp_path: Path) -> None:
    loaded = loaded_with(tmp_path, kind, {"forced_bos_token_id": FORCED}, LoraConfig(r=rank))
    assert decoder_prefix(loaded.model) == (2, FORCED)
    assert any("'<unk>' (forced_bos_token_id)" in note for note in generation_notes(loaded, SamplingConfig()))
    raw: list[torch.Tensor] = []
    decoder = loaded.model.get_decoder()
    handle = decoder.register_forward_pre_hook(
        lambda _, args, kwargs: raw.append(kwargs["input_ids"][:, -1]), with_kwargs=True
    )
    torch.manual_seed(0)
    sampling = SamplingConfig(max_new_tokens=5, min_new_tokens=2)
    rollout = sample_responses(loaded, batch_of(loaded, PROMPTS, 4), sampling)
    handle.remove()
    assert [step.unique().tolist() for step in raw[:2]] == [[2], [FORCED]], (
        "the decoder reads start, then the forced token"
    )
    assert rollout.ids.shape[1] == 5, "the forced token takes no place of the answer's"
    assert len(set(rollout.ids[:, 0].tolist())) > 1, "the first token of an answer is sampled"
    assert int(rollout.sampled.sum(dim=1).min()) > 2

    readings, maps = scored_with_maps(loaded, rollout, sampling, micro_batch_size=3)
    # by hand: the whole decoder input, positions that predict the answer's tokens
    fed = torch.cat([torch.tensor([[2, FORCED]]).expand(8, -1), rollout.ids], dim=1)
    loaded.model.set_attn_implementation("eager")
    with torch.no_grad():
        output = loaded.model(
            input_ids=rollout.prompts.ids,
            attention_mask=rollout.prompts.real.long(),
            decoder_input_ids=fed,
            output_attentions=True,
        )
    mask = rollout.sampled
    by_hand = output.logits[:, 1:-1].log_softmax(dim=-1).gather(2, rollout.ids[:, :, None])[:, :, 0]
    assert torch.allclose(readings.logprobs[mask], by_hand[mask], atol=1e-5)
    stop = output.logits[:, 1:3].softmax(dim=-1)[:, :, 2]  # forbidden at the answer's first two tokens
    assert torch.allclose(readings.sampling_correction[:, :2], torch.log1p(-stop), atol=1e-5)
    assert (readings.sampling_correction[:, 2:] == 0).all()
    cross = torch.stack(output.cross_attentions).mean(dim=(0, 2))[:, 1:-1]
    assert torch.allclose(maps[mask], cross[mask], atol=1e-5)


def test_a_decoder_only_model_is_forced_to_nothing(tmp_path: Path) -> None:
    # transformers forces a token only where the whole input is one token long
    loaded = loaded_with(tmp_path, "llama", {"forced_bos_token_id": FORCED})
    assert loaded.generation.forced == ()
    assert sampled_with(loaded, SamplingConfig()).forced_bos_token_id is None


def test_the_decoders_start_is_the_generation_configs(tmp_path: Path) -> None:
    loaded = loaded_with(tmp_path, "bart", {"decoder_start_token_id": 1})
    assert loaded.model.config.decoder_start_token_id == 2
    assert decoder_prefix(loaded.model) == (1,)


def test_room_is_left_for_a_forced_token(tmp_path: Path) -> None:
    loaded = loaded_with(tmp_path, "bart", {"forced_bos_token_id": FORCED})
    assert loaded.room_for_prompts(63) == 64
    with pytest.raises(ConfigError, match="max_new_tokens 64"):
        loaded.room_for_prompts(64)


# ---- served as it was trained ----


@pytest.mark.parametrize(
    ("kind", "settings", "sampling"),
    [
        ("llama", {}, {}),
        ("llama", PUBLISHED, {"temperature": 0.7}),
        ("llama", PUBLISHED, {"top_k": 5, "top_p": 0.9, "min_new_tokens": 2}),
        ("t5", PUBLISHED, {}),
        ("bart", PUBLISHED | {"forced_bos_token_id": FORCED}, {"min_new_tokens": 2}),
        ("mbart", {"forced_bos_token_id": FORCED, "num_beams": 5, "forced_eos_token_id": 2}, {"temperature": 1.5}),
    ],
)
def test_generate_with_the_saved_file_samples_what_training_sampled(
    kind: str, settings: dict[str, Any], sampling: dict[str, Any], tmp_path: Path
) -> None:
    loaded = loaded_with(tmp_path / "start", kind, settings)
    config = dataclasses.replace(SamplingConfig(max_new_tokens=7), **sampling)
    prompts = batch_of(loaded, PROMPTS, 5)
    torch.manual_seed(5)
    rollout = sample_responses(loaded, prompts, config)
    served = generation.served_with(loaded, config)
    probe = answers_probe(loaded, [([1, 4], [6, 2])])
    save_final(tmp_path, loaded.model, loaded, probe, lambda saved: "card", torch.float32, served)
    auto = loaded.architecture.auto_class
    final = auto.from_pretrained(tmp_path / "final").eval()
    torch.manual_seed(5)
    ids = final.generate(input_ids=prompts.ids, attention_mask=prompts.real.long())
    found = ids[:, len(decoder_prefix(final)) if not loaded.architecture.one_sequence else prompts.ids.shape[1] :]
    if "forced_bos_token_id" in settings:
        assert set(ids[:, 1].tolist()) == {FORCED}
    assert found.tolist() == rollout.ids.tolist()
    again = load_model(ModelConfig(str(tmp_path / "final"), device="cpu"))
    assert not again.generation.off, "what is switched off is out of the file"
    assert "switched off" not in " ".join(generation_notes(again, config))


def test_stop_strings_are_in_the_saved_file(tmp_path: Path) -> None:
    loaded = loaded_with(tmp_path, "llama", {"stop_strings": ["dog"]})
    assert generation.served_with(loaded, SamplingConfig()).stop_strings is None
    assert generation.served_with(loaded, SamplingConfig(stop_strings=["."])).stop_strings == ["."]
    assert "stop_strings ['dog']" in " ".join(generation_notes(loaded, SamplingConfig()))


def test_train_says_it_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = tmp_path / "start"
    loaded_with(start, "bart", {"forced_bos_token_id": FORCED, "num_beams": 4, "max_length": 9})
    data = tiny.save_prompts(tmp_path / "prompts.jsonl")
    flags = (
        "--steps 1 --run.batch_size 2 --num_generations 2 --max_new_tokens 5 --evaluation.held_out 2 --model.device cpu"
    )
    command = ["train", "--model", str(start), "--data", str(data), "--output_dir", str(tmp_path / "run")]
    assert main([*command, *flags.split()]) == 0
    said = capsys.readouterr().out
    assert "every answer begins with '<unk>' (forced_bos_token_id)" in said
    assert "switched off: max_length 9, num_beams 4" in said
    written = json.loads((tmp_path / "run" / "final" / "generation_config.json").read_text())
    expected = {
        "forced_bos_token_id": FORCED,
        "max_new_tokens": 6,
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
    }
    assert {name: written.get(name) for name in expected} == expected
    assert not written.keys() & {"num_beams", "max_length"}
    assert "forced_bos_token_id" in (tmp_path / "run" / "final" / "README.md").read_text()
