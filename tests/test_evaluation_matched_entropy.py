"""Answers with their entropies, and the temperature at which a model has a given entropy."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from cagsr.commands.inputs import read_prompts
from cagsr.config import DataConfig, ModelConfig, SamplingConfig
from cagsr.errors import ModelError
from cagsr.evaluation.matched_entropy import answers_at, matching_temperature
from cagsr.flow import EncodedPrompt
from cagsr.models.inputs import PassInputs
from cagsr.models.load import LoadedModel, load_model

SAMPLING = SamplingConfig(num_generations=1, max_new_tokens=8)


def load(folder: Path, kind: str) -> tuple[LoadedModel, list[EncodedPrompt]]:
    loaded = load_model(
        ModelConfig(str(tiny.save_model(folder / kind, kind, scale=8.0)), device="cpu"), for_training=False
    )
    data = folder / "prompts.jsonl"
    data.write_text("".join(f'{{"prompt": "tell me about the {text}"}}\n' for text in TEXTS))
    return loaded, read_prompts(DataConfig(str(data)), None, None, None, loaded, 8)[0]


TEXTS = ["big red cat near a house", "dog", "small bird and a tree", "cat", "blue house", "tree near the red food area"]


@pytest.fixture(scope="module", params=["llama", "t5"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    return load(tmp_path_factory.mktemp("models"), request.param)


def entropy_by_hand(loaded: LoadedModel, prompt: EncodedPrompt, text: str, tokens: int, temperature: float) -> float:
    """One prompt alone, no padding, its own tokens: the answers below hold only words of the vocabulary."""
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids += [loaded.stop_ids[0]] * (tokens - len(ids))
    prompt_ids, response = torch.tensor([prompt.ids]), torch.tensor([ids])
    inputs = PassInputs(prompt_ids, torch.ones_like(prompt_ids).bool(), response, torch.ones_like(response).bool())
    with torch.no_grad():
        logits = loaded.teacher_forced(inputs)
    total = 0.0
    for row in logits[0].double() / temperature:
        p = row.softmax(-1)
        total -= float((p * p.log()).sum())
    return total / tokens


@pytest.mark.parametrize("temperature", [1.3, 0.7])
def test_every_prompt_gets_its_own_answer_and_entropy(model, temperature: float) -> None:
    loaded, prompts = model
    prompts = prompts * 4
    sampling = SamplingConfig(num_generations=1, max_new_tokens=3, temperature=temperature)
    found = answers_at(loaded, prompts, sampling, seed=3, batch_size=5)
    checked = 0
    for number, prompt in enumerate(prompts):
        words = len(loaded.tokenizer(found.texts[number], add_special_tokens=False)["input_ids"])
        # Special tokens in the middle of an answer vanish from the text: such answers can't be rebuilt from it.
        if words + found.ended[number] == found.tokens[number]:
            expected = entropy_by_hand(loaded, prompt, found.texts[number], int(found.tokens[number]), temperature)
            assert found.entropy[number] == pytest.approx(expected, rel=1e-3)
            checked += 1
    assert checked >= 6


def test_answers_to_one_prompt_stand_in_a_row_and_greedy_ones_are_alike(model) -> None:
    loaded, prompts = model
    sampling = SamplingConfig(num_generations=2, max_new_tokens=8, temperature=0.0)
    twice = answers_at(loaded, prompts, sampling, 0, 4)
    once = answers_at(loaded, prompts, SamplingConfig(num_generations=1, max_new_tokens=8, temperature=0.0), 0, 64)
    assert twice.texts[::2] == twice.texts[1::2] == once.texts
    np.testing.assert_allclose(twice.entropy[::2], once.entropy, rtol=1e-4)


def test_the_same_seed_gives_the_same_answers_and_leaves_the_generators_alone(model) -> None:
    loaded, prompts = model
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = answers_at(loaded, prompts, SAMPLING, 1, 4)
    torch.testing.assert_close(torch.rand(3), expected)
    assert answers_at(loaded, prompts, SAMPLING, 1, 4).texts == first.texts
    assert answers_at(loaded, prompts, SAMPLING, 2, 4).texts != first.texts


@pytest.mark.parametrize("temperature", [0.55, 0.9, 1.25])
def test_a_models_own_temperature_is_found_again(model, temperature: float) -> None:
    loaded, prompts = model
    prompts = prompts * 8
    target = float(answers_at(loaded, prompts, at(temperature), 0, 64).entropy.mean())
    found = matching_temperature(loaded, prompts, SAMPLING, target, 0, 64)
    entropy = float(answers_at(loaded, prompts, at(found), 0, 64).entropy.mean())
    assert found == pytest.approx(temperature, abs=0.03)
    assert entropy == pytest.approx(target, rel=0.03)


def at(temperature: float) -> SamplingConfig:
    return SamplingConfig(num_generations=1, max_new_tokens=8, temperature=temperature)


def test_what_is_known_is_not_sampled_again(model, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, prompts = model
    known = {1.0: float(answers_at(loaded, prompts, at(1.0), 0, 64).entropy.mean())}
    import cagsr.evaluation.matched_entropy as module

    asked: list[float] = []

    def spy(loaded, prompts, sampling, *rest):
        asked.append(sampling.temperature)
        return answers_at(loaded, prompts, sampling, *rest)

    monkeypatch.setattr(module, "answers_at", spy)
    assert matching_temperature(loaded, prompts, SAMPLING, known[1.0], 0, 64, known=known) == pytest.approx(1.0)
    assert asked == []
    matching_temperature(loaded, prompts, SAMPLING, 0.9 * known[1.0], 0, 64, known=known)
    assert asked
    assert 1.0 not in asked


def test_an_entropy_out_of_reach_is_refused(model) -> None:
    loaded, prompts = model
    most = math.log(len(tiny.WORDS) + len(tiny.SPECIAL))
    with pytest.raises(ModelError, match=r"not reached at temperatures between 0\.2 .* and 1\.5"):
        matching_temperature(loaded, prompts, SAMPLING, most, 0, 64)
    with pytest.raises(ModelError, match=r"not reached at temperatures between 0\.9 .* and 1"):
        matching_temperature(loaded, prompts, SAMPLING, 0.05, 0, 64, low=0.9, high=1.0)
    with pytest.raises(ModelError, match="no temperature above 0"):
        matching_temperature(loaded, prompts, SAMPLING, 0.0, 0, 64)
