"""Answers from a real local HTTP server that speaks vLLM's protocol (tests/vllm_server.py): tokens, weights, refusals."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import tiny
from cagsr.config import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    PPOConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    TrainConfig,
)
from cagsr.errors import CagsrError, ConfigError, RolloutError
from cagsr.flow import EncodedPrompt, EpisodeBatch, Prompt
from cagsr.models.load import LoadedModel, load_model
from cagsr.prompts.batch import collate_prompts
from cagsr.prompts.prepare import prepare_prompts
from cagsr.reward.build import build_reward
from cagsr.reward.registry import Resources
from cagsr.rollout.sampler import Sampler, build_sampler
from cagsr.rollout.vllm_weights import policy_weights
from cagsr.support.http_json import HttpStatusError
from cagsr.training.ppo import PPO
from scored import scored
from vllm_server import Served, serving

TEXTS = ["a cat", "tell me about the small red bird near a house", "the dog sees a tree"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save_model(tmp_path / "model")


@pytest.fixture
def engine(folder: Path) -> Iterator[Served]:
    with serving(folder) as served:
        yield served


def config_for(folder: Path, url: str, **changes: Any) -> TrainConfig:
    config = TrainConfig(
        model=ModelConfig(str(folder), device="cpu"),
        data=DataConfig(str(folder.parent / "prompts.jsonl")),
        output_dir=str(folder.parent / "run"),
        sampling=SamplingConfig(num_generations=4, max_new_tokens=6),
        rollout=RolloutConfig(engine="vllm", url=url, wait=0, timeout=20),
        ppo=PPOConfig(num_ppo_epochs=2, learning_rate=1e-2),
        run=RunConfig(steps=5),
    )
    return dataclasses.replace(config, **changes)


def ppo_for(config: TrainConfig) -> tuple[PPO, list[EncodedPrompt]]:
    tiny.save_prompts(Path(config.data.path))
    torch.manual_seed(0)
    loaded = load_model(config.model, config.lora)
    prompts = prepare_prompts(config.data, config.salience, loaded.tokenizer, max_length=50)
    ppo = PPO(
        config,
        loaded,
        build_reward(config.reward, device="cpu", resources=Resources(loaded.texts)),
        Accelerator(cpu=True),
    )
    return ppo, list(prompts.prompts[:3])


def sampler_for(config: TrainConfig) -> tuple[Sampler, LoadedModel]:
    loaded = load_model(config.model, config.lora)
    return build_sampler(config, loaded, Accelerator(cpu=True)), loaded


def sampled(sampler: Sampler, loaded: LoadedModel, sampling: SamplingConfig) -> EpisodeBatch:
    encoded = []
    for row, text in enumerate(TEXTS, 1):
        ids = tuple(loaded.tokenizer(text).input_ids)
        encoded.append(EncodedPrompt(Prompt(row, text), ids, (-1,) * len(ids), ()))
    batch = collate_prompts(
        encoded, pad_token_id=loaded.pad_token_id, padding_side="left", num_generations=sampling.num_generations
    )
    torch.manual_seed(3)
    return sampler.sample(batch, sampling)


def served_differs(engine: Served, loaded: LoadedModel) -> set[str]:
    """Names of weights that the server has otherwise than the policy."""
    served = engine.weights
    policy = {weight.name: weight.tensor() for weight in policy_weights(loaded)}
    assert served.keys() == policy.keys()
    return {name for name, value in policy.items() if not torch.equal(value, served[name])}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize(
    "filters", [{}, {"temperature": 1.7}, {"min_new_tokens": 3, "top_p": 0.7, "temperature": 2.0}, {"top_k": 3}]
)
def test_the_engines_logprobs_are_the_scoring_passs(kind: str, filters: dict[str, Any], tmp_path: Path):
    """Left padding, positions, temperature, filters: the server knows none of our batches and agrees on every token."""
    sampling = SamplingConfig(num_generations=3, max_new_tokens=8, **filters)
    with serving(tiny.save_model(tmp_path / "model", kind)) as engine:
        ppo, _ = ppo_for(config_for(tmp_path / "model", engine.url, sampling=sampling))
        rollout = sampled(ppo.sampler, ppo.loaded, sampling)
    readings = scored(ppo.loaded, rollout, sampling, micro_batch_size=5)
    mask = rollout.sampled
    assert rollout.sampler_logprobs is not None
    torch.testing.assert_close(
        (readings.logprobs - readings.sampling_correction)[mask], rollout.sampler_logprobs[mask], atol=2e-5, rtol=1e-5
    )
    assert (rollout.sampler_logprobs[~mask] == 0).all()
    assert int(mask.sum(1).min()) >= sampling.min_new_tokens
    assert int(mask.sum()) > len(mask)


def test_candidates_and_prompts_keep_their_order(engine: Served, folder: Path):
    sampling = SamplingConfig(num_generations=4, max_new_tokens=6)
    sampler, loaded = sampler_for(config_for(folder, engine.url))
    rollout = sampled(sampler, loaded, sampling)
    assert len(engine.given) == 12
    for row, given in enumerate(engine.given):
        prompt = rollout.prompts.ids[row][rollout.prompts.real[row]].tolist()
        assert prompt == given["prompt_token_ids"] == loaded.tokenizer(TEXTS[row // 4]).input_ids
        assert rollout.ids[row][rollout.sampled[row]].tolist() == given["token_ids"]
        assert bool(rollout.ended[row]) == (given["finish_reason"] == "stop")
    (request,) = [body for path, body in engine.asked if path == "/v1/completions"]
    assert len(request["prompt"]) == 3  # once each, not once for each candidate


def test_answers_end_at_every_stop_token_and_at_the_length_limit(folder: Path):
    """A second stop token in the generation config, as chat models have one."""
    loaded = load_model(ModelConfig(str(folder), device="cpu"))
    cat = loaded.tokenizer.convert_tokens_to_ids("cat")
    loaded.model.generation_config.eos_token_id = [2, cat]
    loaded.model.generation_config.save_pretrained(folder)
    sampling = SamplingConfig(num_generations=16, max_new_tokens=5, temperature=4.0)
    with serving(folder) as engine:
        rollout = sampled(*sampler_for(config_for(folder, engine.url)), sampling)
        sent = [len(given["token_ids"]) for given in engine.given]
    lengths = rollout.sampled.sum(1)
    last = rollout.ids.gather(1, lengths[:, None] - 1)[:, 0]
    assert rollout.ended.tolist() == [token in (2, cat) for token in last.tolist()]
    assert {2, cat} <= set(last.tolist())
    assert lengths[~rollout.ended].unique().tolist() == [5]
    assert int(lengths[rollout.ended].min()) < 5
    assert sent == lengths.tolist()  # the server stopped, not only we
    assert all("cat" not in text for text, token in zip(rollout.completions, last, strict=True) if token == 2)


def test_answers_end_at_a_stop_string(engine: Served, folder: Path):
    sampling = SamplingConfig(num_generations=16, max_new_tokens=8, temperature=4.0, stop_strings=["dog"])
    rollout = sampled(*sampler_for(config_for(folder, engine.url)), sampling)
    dog = tiny.tokenizer().convert_tokens_to_ids("dog")
    with_dog = (rollout.ids == dog).any(1)
    assert with_dog.any()
    assert rollout.ended[with_dog].all()
    lengths = rollout.sampled.sum(1)
    assert (rollout.ids.gather(1, lengths[:, None] - 1)[with_dog] == dog).all()
    assert all("dog" not in text for text in rollout.completions)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_server_has_the_policys_weights_after_every_update(rank: int, engine: Served, folder: Path) -> None:
    ppo, prompts = ppo_for(config_for(folder, engine.url, lora=LoraConfig(r=rank)))
    base = {name: value.clone() for name, value in ppo.loaded.model.named_parameters() if not value.requires_grad}
    engine.change(scale=["lm_head.weight", 3.0])  # what another run left on the server
    assert served_differs(engine, ppo.loaded) == {"lm_head.weight"}
    for _ in range(2):
        experience = ppo.collect(prompts)
        assert served_differs(engine, ppo.loaded) == set()
        assert experience.sampler_metrics["sampling/sampling_logp_difference/mean"] < 1e-5
        ppo.update(experience)
        assert len(served_differs(engine, ppo.loaded)) >= 14  # every layer's projections moved
    rollout = ppo.sampler.sample(experience.episodes.prompts, ppo.config.sampling)
    assert served_differs(engine, ppo.loaded) == set()
    logprobs = scored(ppo.loaded, rollout, ppo.config.sampling, micro_batch_size=5).logprobs
    torch.testing.assert_close(logprobs, rollout.sampler_logprobs, atol=2e-5, rtol=1e-5)
    # The frozen base is not touched by a merge that is taken back: it would drift from step to step.
    assert all(torch.equal(value, dict(ppo.loaded.model.named_parameters())[name]) for name, value in base.items())


def test_weights_go_once_an_update_and_the_prefix_cache_goes_with_them(engine: Served, folder: Path):
    config = config_for(folder, engine.url)
    left = Path(config.output_dir) / "rollout-weights" / "policy-000007"  # by a run that was killed
    left.mkdir(parents=True)
    sampler, loaded = sampler_for(config)
    engine.change(asked=[])
    for changed in (False, False, True):
        if changed:
            sampler.policy_changed()
        sampled(sampler, loaded, config.sampling)
    send = ["/collective_rpc", "/reset_prefix_cache", "/v1/completions"]
    assert [path for path, _ in engine.asked] == [*send, "/v1/completions", *send]
    assert [path.name for path in left.parent.iterdir()] == ["policy-000002"]  # only the latest is kept
    sampler.close()
    assert not left.parent.exists()


def test_a_server_with_other_weights_stops_the_run(engine: Served, folder: Path):
    ppo, prompts = ppo_for(config_for(folder, engine.url))
    ppo.collect(prompts)
    engine.change(scale=["lm_head.weight", -1.0])
    with pytest.raises(RolloutError, match=r"nats a token.*max_logp_difference 0\.5.*another model"):
        ppo.collect(prompts)
    ppo.config = dataclasses.replace(
        ppo.config, rollout=dataclasses.replace(ppo.config.rollout, max_logp_difference=0.0)
    )
    experience = ppo.collect(prompts)
    metrics = experience.sampler_metrics
    assert metrics["sampling/sampling_logp_difference/mean"] > 0.5
    mask, drawn = experience.episodes.sampled, experience.episodes.sampler_logprobs
    assert drawn is not None
    # The server draws as it likes, so what is truncated at 2 is worked out of what it drew.
    expected = (experience.readings.logprobs - drawn)[mask].clamp(max=math.log(2.0))
    torch.testing.assert_close(experience.readings.sampling_correction[mask], expected)
    assert metrics["sampling/importance_sampling_ratio/max"] == pytest.approx(float(expected.max().exp()))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("an answer too few", "11 answers instead of 12"),
        ("numbers", "not numbered from 0"),
        ("no ids", "row 1 has no token ids"),
        ("other prompt", "row 1 is an answer to other token ids"),
        ("too many tokens", "1 to 6 of each were asked for"),
        ("a logprob too few", "1 to 6 of each were asked for"),
        ("outside", "outside the policy's vocabulary of 28"),
        ("nan", "not a number"),
        ("cut", "cut after 1 of 6 tokens"),
        ("other stop", "ends with token 5, which is no stop token"),
        ("no json", "no vLLM server"),
    ],
)
def test_a_faulty_reply_is_refused_in_one_sentence(name: str, says: str, engine: Served, folder: Path) -> None:
    sampler, loaded = sampler_for(config_for(folder, engine.url))
    engine.change(fault=name)
    with pytest.raises(RolloutError, match=says) as refusal:
        sampled(sampler, loaded, SamplingConfig(num_generations=4, max_new_tokens=6, min_new_tokens=2))
    assert "\n" not in str(refusal.value)


def refused(config: TrainConfig, kind: type[CagsrError]) -> str:
    with pytest.raises(kind) as refusal:
        sampler_for(config)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_a_server_that_is_not_fit_is_refused_before_anything_is_sampled(engine: Served, folder: Path, tmp_path: Path):
    config = config_for(folder, engine.url)
    engine.change(dev_mode=False)
    assert "VLLM_SERVER_DEV_MODE=1" in refused(config, RolloutError)
    fit = {
        "model_config": {"model": str(folder), "logprobs_mode": "processed_logprobs"},
        "weight_transfer_config": None,
    }
    engine.change(
        dev_mode=True, settings=fit | {"model_config": {"model": str(folder), "logprobs_mode": "raw_logprobs"}}
    )
    assert "--logprobs-mode processed_logprobs" in refused(config, RolloutError)
    engine.change(settings=fit)
    nccl = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, weights="nccl"))
    assert "weight-transfer engine" in refused(nccl, RolloutError)
    engine.change(settings=fit | {"weight_transfer_config": {"backend": "nccl"}})
    assert "the policy is on cpu" in refused(nccl, ConfigError)
    tiny.tokenizer(bos=False).save_pretrained(tmp_path / "other")
    engine.change(tokenizer=str(tmp_path / "other"))
    assert "tokenizer reads a text otherwise" in refused(config, RolloutError)


def test_a_vocabulary_that_has_grown_is_refused(tmp_path: Path):
    folder = tiny.save_model(tmp_path / "model", pad=None)
    config = config_for(folder, "", model=ModelConfig(str(folder), device="cpu", pad_token="<new>"))
    with serving(folder) as engine:
        rollout = dataclasses.replace(config.rollout, url=engine.url)
        assert "grow from 28 to 29" in refused(dataclasses.replace(config, rollout=rollout), ConfigError)


def test_a_server_with_another_architecture_is_refused_at_the_first_weights(folder: Path, tmp_path: Path):
    with serving(tiny.save_model(tmp_path / "other", "qwen3")) as other:
        sampler, loaded = sampler_for(config_for(folder, other.url))
        other.change(model=str(tiny.save_model(tmp_path / "gpt2", "gpt2")))
        with pytest.raises(RolloutError, match=r"can't load the weights in .*policy-000001 \(status 500\)"):
            sampled(sampler, loaded, SamplingConfig(num_generations=2, max_new_tokens=3))


def test_no_room_for_a_prompt_names_its_row(engine: Served, folder: Path):
    engine.change(context=15)
    sampler, loaded = sampler_for(config_for(folder, engine.url))
    with pytest.raises(RolloutError, match=r"row 2: its 11 tokens and 6 new ones exceed the 15 tokens"):
        sampled(sampler, loaded, SamplingConfig(num_generations=2, max_new_tokens=6))
    sampled(sampler, loaded, SamplingConfig(num_generations=2, max_new_tokens=4))  # just fits


def test_an_encoder_decoder_model_is_refused(tmp_path: Path):
    folder = tiny.save_model(tmp_path / "model", "t5")
    assert "encoder-decoder" in refused(config_for(folder, "http://127.0.0.1:9"), ConfigError)


def test_an_error_reaches_the_other_processes_as_it_was():
    """Errors of the main process are broadcast, pickled."""
    error = pickle.loads(pickle.dumps(HttpStatusError("status 404", 404)))
    assert (str(error), error.status) == ("status 404", 404)
