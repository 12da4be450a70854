"""Sampling: cut at the first stop, masks, stop strings, and the model's own generation defaults switched off."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import tiny
from cagsr.config import LoraConfig, ModelConfig, SamplingConfig
from cagsr.flow import Prompt, PromptBatch
from cagsr.models.generation import sampled_with
from cagsr.models.load import LoadedModel, load_model
from cagsr.rollout import decode as decode_module
from cagsr.rollout import sample
from cagsr.rollout.sample import cut_responses, sample_responses
from rows_sampled import rows_sampled_at_once
from scored import scored


def batch_of(loaded: LoadedModel, texts: list[str]) -> PromptBatch:
    encoded = loaded.tokenizer(texts, return_tensors="pt", padding=True, padding_side=loaded.architecture.padding_side)
    count = len(texts)
    return PromptBatch(
        tuple(Prompt(row, text) for row, text in enumerate(texts, 1)),
        encoded.input_ids,
        encoded.attention_mask.bool(),
        torch.full_like(encoded.input_ids, -1),
        torch.ones(count, 1),
        torch.arange(count),
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(ModelConfig(str(tiny.save_model(tmp_path_factory.mktemp("llama"))), device="cpu"))


def test_cut_keeps_the_first_stop_token_and_nothing_after_it(llama: LoadedModel):
    cat, dog = llama.tokenizer.convert_tokens_to_ids(["cat", "dog"])
    ids = torch.tensor([[cat, 2, dog, 2], [cat, dog, dog, cat], [2, cat, cat, cat]])
    rollout = cut_responses(ids, batch_of(llama, ["the cat"] * 3), llama, (2,))
    assert rollout.sampled.sum(1).tolist() == [2, 4, 1]
    assert rollout.ended.tolist() == [True, False, True]
    assert rollout.completions == ("cat", "cat dog dog cat", "")
    assert rollout.ids[0].tolist() == [cat, 2, 0, 0]


def test_cut_at_a_stop_string_keeps_the_token_that_completes_it(llama: LoadedModel):
    cat, dog, dot = llama.tokenizer.convert_tokens_to_ids(["cat", "dog", "."])
    ids = torch.tensor([[cat, dot, dog, dot], [cat, dog, cat, dog]])
    rollout = cut_responses(ids, batch_of(llama, ["the"] * 2), llama, (2,), ["."])
    assert rollout.sampled.sum(1).tolist() == [2, 4]
    assert rollout.ended.tolist() == [True, False]
    assert rollout.completions[0].strip() == "cat"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bart"])
def test_greedy_answers_do_not_depend_on_padding(kind: str, tmp_path: Path):
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path, kind)), device="cpu"))
    greedy = SamplingConfig(temperature=0, min_new_tokens=5, max_new_tokens=8)
    short, long = "a cat", "tell me about the small red bird near a house"
    alone = sample_responses(loaded, batch_of(loaded, [short]), greedy)
    together = sample_responses(loaded, batch_of(loaded, [short, long]), greedy)
    length = int(alone.sampled.sum())
    assert length > 1
    assert together.ids[0, :length].tolist() == alone.ids[0, :length].tolist()


def test_generation_defaults_of_the_model_are_switched_off_and_put_back(tmp_path: Path):
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path)), device="cpu"))
    own = loaded.model.generation_config
    own.repetition_penalty, own.top_k, own.do_sample = 50.0, 1, True
    prompts = batch_of(loaded, ["the cat"] * 200)
    torch.manual_seed(0)
    rollout = sample_responses(loaded, prompts, SamplingConfig(max_new_tokens=1))
    # with top_k = 1 from the model's file every answer would be the same token
    assert len(set(rollout.ids[:, 0].tolist())) > 5
    assert loaded.model.generation_config is own


def test_min_and_max_new_tokens(llama: LoadedModel):
    torch.manual_seed(0)
    sampling = SamplingConfig(min_new_tokens=4, max_new_tokens=6, temperature=3.0)
    rollout = sample_responses(llama, batch_of(llama, ["the cat sees"] * 64), sampling)
    lengths = rollout.sampled.sum(1)
    assert int(lengths.min()) > 4 - 1
    assert int(lengths.max()) <= 6


def _transformers_own(loaded: LoadedModel, prompts: PromptBatch, sampling: SamplingConfig) -> torch.Tensor:
    """What transformers' own loop gives, every row to the end, each prompt read once for each of its answers."""
    settings = sampled_with(loaded, sampling)
    with torch.no_grad(), sample._only_these_settings(loaded.model, settings):
        ids = loaded.model.generate(input_ids=prompts.ids, attention_mask=prompts.real.long())
    return ids[:, 1 if not loaded.architecture.one_sequence else prompts.ids.shape[1] :]


def _several(loaded: LoadedModel, texts: list[str], answers: int) -> PromptBatch:
    prompts = batch_of(loaded, [text for text in texts for _ in range(answers)])
    return dataclasses.replace(prompts, group=torch.arange(len(texts)).repeat_interleave(answers))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bart", "mistral", "qwen3", "lfm2"])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.8}, {"top_k": 5, "min_new_tokens": 3}, {"temperature": 0.0}])
def test_rows_that_leave_change_no_token(kind: str, filters: dict[str, float], tmp_path: Path):
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path, kind)), device="cpu"))
    with torch.no_grad():  # ends at all lengths: the stop token comes up about once in eight tokens
        head = loaded.model.get_output_embeddings()
        head.weight.mul_(0.05)
    sampling = dataclasses.replace(SamplingConfig(max_new_tokens=24), **filters)
    prompts = _several(loaded, ["a cat", "tell me about the small red bird near a house", "the dog"], 6)
    torch.manual_seed(3)
    expected = cut_responses(_transformers_own(loaded, prompts, sampling), prompts, loaded, loaded.stop_ids)
    torch.manual_seed(3)
    found = sample_responses(loaded, prompts, sampling)
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.ended.tolist() == expected.ended.tolist()
    if sampling.temperature and not sampling.top_k:
        assert len(set(found.sampled.sum(1).tolist())) > 3, "the test says nothing where all end together"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "t5", "bart"])
@pytest.mark.parametrize("rank", [0, 2])
def test_gradient_checkpointing_changes_no_token(kind: str, rank: int, tmp_path: Path):
    path = str(tiny.save_model(tmp_path, kind))
    texts = ["a cat", "tell me about the small red bird near a house"]
    answers = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = ModelConfig(path, device="cpu", gradient_checkpointing=checkpointing)
        loaded = load_model(model, LoraConfig(r=rank))
        training = {name for name, module in loaded.model.named_modules() if module.training}
        assert bool(training) == checkpointing
        torch.manual_seed(3)
        rollout = sample_responses(loaded, _several(loaded, texts, 4), SamplingConfig(max_new_tokens=12))
        answers.append(rollout.ids.tolist())
        # the update's passes are checkpointed again
        assert {name for name, module in loaded.model.named_modules() if module.training} == training
    assert answers[0] == answers[1]


def test_a_prompt_is_read_once_for_all_its_answers_and_finished_rows_are_not_fed(llama: LoadedModel):
    fed: list[tuple[int, int]] = []
    embedding = llama.model.get_input_embeddings()
    handle = embedding.register_forward_pre_hook(lambda _, args: fed.append(tuple(args[0].shape)))
    try:
        torch.manual_seed(0)
        rollout = sample_responses(llama, _several(llama, ["the cat", "a dog"], 8), SamplingConfig(max_new_tokens=30))
    finally:
        handle.remove()
    assert fed[0][0] == 2
    lengths = rollout.sampled.sum(1)
    for step, (rows, width) in enumerate(fed[1:], 1):
        going = int((lengths > step).sum())
        assert width == 1
        assert going <= rows <= max(going / decode_module.LEAVE_WHEN, going), step
    assert fed[-1][0] < 16


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_answers_sampled_in_parts_are_those_sampled_at_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path, kind)), device="cpu"))
    prompts = _several(loaded, ["a cat", "tell me about the small red bird", "the dog"], 3)
    rows = rows_sampled_at_once(monkeypatch)
    greedy = SamplingConfig(temperature=0, max_new_tokens=9)
    together = sample_responses(loaded, prompts, greedy)
    parts = sample_responses(loaded, prompts, greedy, batch_size=7)
    assert rows == [9, 6, 3], "whole prompts, as many as fit"
    assert parts.ids.tolist() == together.ids.tolist()
    assert parts.completions == together.completions
    # Parts differ in length, and each answer's log-probabilities stay beside it.
    torch.manual_seed(0)
    drawn = sample_responses(loaded, prompts, SamplingConfig(max_new_tokens=9), batch_size=1)
    assert rows[3:] == [3, 3, 3], "a prompt's answers at least"
    readings = scored(loaded, drawn)
    assert drawn.decoded_logprobs is not None
    torch.testing.assert_close(
        drawn.decoded_logprobs, readings.logprobs.masked_fill(~drawn.sampled, 0.0), atol=1e-4, rtol=1e-4
    )


def test_groups_of_different_sizes_are_sampled_row_by_row(llama: LoadedModel):
    prompts = dataclasses.replace(batch_of(llama, ["the cat", "the cat", "a dog"]), group=torch.tensor([0, 0, 1]))
    rollout = sample_responses(llama, prompts, SamplingConfig(max_new_tokens=3))
    assert rollout.ids.shape[0] == 3


def test_a_stop_string_ends_an_answer_while_sampling(llama: LoadedModel):
    stop = "dog"
    # The prompt says the stop string too: that ends nothing.
    prompts = _several(llama, [f"the cat {stop}", "a dog"], 20)
    torch.manual_seed(0)
    free = sample_responses(llama, prompts, SamplingConfig(max_new_tokens=20))
    torch.manual_seed(0)
    found = sample_responses(llama, prompts, SamplingConfig(max_new_tokens=20, stop_strings=[stop]))
    said = [row for row, text in enumerate(free.completions) if stop in text]
    assert len(said) > 5
    for row, text in enumerate(free.completions):
        assert found.completions[row] == (text[: text.find(stop)] if row in said else text)
        assert bool(found.ended[row]) == bool(row in said or free.ended[row])
    assert int(found.sampled.sum()) < int(free.sampled.sum())
