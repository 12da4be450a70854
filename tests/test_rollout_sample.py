"""Sampling: cut at the first stop, masks, stop strings, and the model's own generation defaults switched off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from cagsr.config import ModelConfig, SamplingConfig
from cagsr.flow import Prompt, PromptBatch
from cagsr.models.load import LoadedModel, load_model
from cagsr.rollout.sample import cut_responses, sample_responses


def batch_of(loaded: LoadedModel, texts: list[str]) -> PromptBatch:
    encoded = loaded.tokenizer(texts, return_tensors="pt", padding=True, padding_side=loaded.padding_side)
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
    rollout = cut_responses(ids, batch_of(llama, ["the cat"] * 3), llama.tokenizer, (2,))
    assert rollout.response_mask.sum(1).tolist() == [2, 4, 1]
    assert rollout.ended.tolist() == [True, False, True]
    assert rollout.completions == ("cat", "cat dog dog cat", "")
    assert rollout.response_ids[0].tolist() == [cat, 2, 0, 0]


def test_cut_at_a_stop_string_keeps_the_token_that_completes_it(llama: LoadedModel):
    cat, dog, dot = llama.tokenizer.convert_tokens_to_ids(["cat", "dog", "."])
    ids = torch.tensor([[cat, dot, dog, dot], [cat, dog, cat, dog]])
    rollout = cut_responses(ids, batch_of(llama, ["the"] * 2), llama.tokenizer, (2,), ["."])
    assert rollout.response_mask.sum(1).tolist() == [2, 4]
    assert rollout.ended.tolist() == [True, False]
    assert rollout.completions[0].strip() == "cat"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bart"])
def test_greedy_answers_do_not_depend_on_padding(kind: str, tmp_path: Path):
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path, kind)), device="cpu"))
    greedy = SamplingConfig(temperature=0, min_new_tokens=5, max_new_tokens=8)
    short, long = "a cat", "tell me about the small red bird near a house"
    alone = sample_responses(loaded, batch_of(loaded, [short]), greedy)
    together = sample_responses(loaded, batch_of(loaded, [short, long]), greedy)
    length = int(alone.response_mask.sum())
    assert length > 1
    assert together.response_ids[0, :length].tolist() == alone.response_ids[0, :length].tolist()


def test_generation_defaults_of_the_model_are_switched_off_and_put_back(tmp_path: Path):
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path)), device="cpu"))
    own = loaded.model.generation_config
    own.repetition_penalty, own.top_k, own.do_sample = 50.0, 1, True
    prompts = batch_of(loaded, ["the cat"] * 200)
    torch.manual_seed(0)
    rollout = sample_responses(loaded, prompts, SamplingConfig(max_new_tokens=1))
    # with top_k = 1 from the model's file every answer would be the same token
    assert len(set(rollout.response_ids[:, 0].tolist())) > 5
    assert loaded.model.generation_config is own


def test_min_and_max_new_tokens(llama: LoadedModel):
    torch.manual_seed(0)
    sampling = SamplingConfig(min_new_tokens=4, max_new_tokens=6, temperature=3.0)
    rollout = sample_responses(llama, batch_of(llama, ["the cat sees"] * 64), sampling)
    lengths = rollout.response_mask.sum(1)
    assert int(lengths.min()) > 4 - 1
    assert int(lengths.max()) <= 6
