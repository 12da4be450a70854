"""The reward functions for verl and OpenRLHF, called as those call them: by path, by keyword, from threads."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import apart
import cagsr.integrations
import tiny
from cagsr.config import AttentionConfig, DataConfig, ModelConfig, RewardConfig, SalienceConfig
from cagsr.errors import ConfigError, DataError
from cagsr.integrations import verl_worker
from cagsr.integrations.frozen import VARIABLE, FrozenScorer
from cagsr.models.load import load_model
from cagsr.prompts.prepare import prepare_prompts
from cagsr.reward.answers import AnswerScorer
from cagsr.scoring.answers import Response
from cagsr.support.extras import is_installed

ANSWERS = ["the red cat near a house .", "a dog likes food , a dog likes food , a dog likes food", "bird"]
CHAT = (
    "{% for m in messages %}<bos> {{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<bos> me {% endif %}"
)
REWARD = RewardConfig(focus=replace(RewardConfig().focus, weight=0.5), normalize="none")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, prompts as text and as messages, and a YAML file for each."""
    folder = tmp_path_factory.mktemp("apart")
    tiny.save_model(folder / "start")
    tokenizer = AutoTokenizer.from_pretrained(folder / "start")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder / "start")
    tiny.save_prompts(folder / "plain.jsonl")
    rows = [json.loads(line) for line in (folder / "plain.jsonl").read_text().splitlines()]
    chats = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    for name in ("plain", "chat"):
        (folder / f"{name}.yaml").write_text(
            f"model: {{path: {folder / 'start'}, device: cpu}}\n"
            f"data: {{path: {folder / name}.jsonl}}\n"
            "reward: {normalize: none, focus: {weight: 0.5}}\n"
            "ppo: {kl_coef: 0.1}\n"  # a training run's file serves: what only training has is left out
        )
    return folder


def by_path(name: str) -> ModuleType:
    """Import a module as both loops do: from its file, under a name of their own."""
    path = Path(cagsr.integrations.__file__).parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location("reward_func", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def expected(folder: Path, name: str, ids: list[list[int]] | None = None) -> dict[str, list[float]]:
    """What the scorer gives for the file's first prompts and ``ANSWERS`` (or their ``ids``), and the weighted sum."""
    loaded = load_model(ModelConfig(str(folder / "start"), device="cpu"), for_training=False)
    found = prepare_prompts(
        DataConfig(str(folder / f"{name}.jsonl")), SalienceConfig(), loaded.tokenizer, max_length=60
    )
    scorer = AnswerScorer(loaded, REWARD, AttentionConfig(), SalienceConfig())
    tokens = ids or [[*loaded.tokenizer(text, add_special_tokens=False)["input_ids"], 2] for text in ANSWERS]
    prompts = list(found.prompts[: len(tokens)])
    if name == "plain" and ids is not None:  # OpenRLHF puts no BOS before a text
        prompts = [replace(one, ids=one.ids[1:], words=one.words[1:]) for one in prompts]
    responses = [Response(text, tuple(one), one[-1] == 2) for text, one in zip(ANSWERS, tokens, strict=True)]
    ((_, terms),) = scorer.score_texts(prompts, responses)
    values = {name: terms[name].tolist() for name in ("grounded_coverage", "focus", "echo", "repetition")}
    values["score"] = [g + 0.5 * f - 5.0 * e - 0.3 * r for g, f, e, r in zip(*values.values(), strict=True)]
    return values


def prompts_of(folder: Path, name: str) -> list[Any]:
    return [json.loads(line)["prompt"] for line in (folder / f"{name}.jsonl").read_text().splitlines()][: len(ANSWERS)]


@pytest.mark.parametrize("name", ["plain", "chat"])
def test_verl_gets_the_scorers_values(workplace: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(workplace / f"{name}.yaml"))
    compute_score = by_path("verl").compute_score
    given = prompts_of(workplace, name)
    if name == "chat":
        given = [np.array(prompt, dtype=object) for prompt in given]  # as parquet gives lists

    def call(row: int) -> dict[str, float]:
        # The keywords of verl's NaiveRewardManager.
        return compute_score(
            data_source="tiny", solution_str=ANSWERS[row], ground_truth=None, extra_info={"prompt": given[row]}
        )

    with ThreadPoolExecutor(3) as threads:  # verl calls from a pool of threads
        found = list(threads.map(call, range(len(ANSWERS))))
    wanted = expected(workplace, name)
    assert found[0].keys() == wanted.keys()
    for key, values in wanted.items():
        assert [row[key] for row in found] == pytest.approx(values, abs=1e-5), key
    assert wanted["repetition"][1] > 0.3


def test_verl_takes_its_settings_from_reward_kwargs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    compute_score = by_path("verl").compute_score
    row = {"question": prompts_of(workplace, "plain")[0]}
    with pytest.raises(ConfigError, match=VARIABLE):
        compute_score("tiny", ANSWERS[0], None, {"prompt": "tell me"})
    kwargs = {"config": str(workplace / "plain.yaml"), "prompt_key": "question", "reward_router_address": None}
    found = compute_score("tiny", ANSWERS[0], None, row, **kwargs)
    assert found["score"] == pytest.approx(expected(workplace, "plain")["score"][0], abs=1e-5)
    with pytest.raises(DataError, match="extra_info holds no 'prompt'"):
        compute_score("tiny", ANSWERS[0], None, row, config=str(workplace / "plain.yaml"))
    assert compute_score("tiny", "", None, row, **kwargs)["repetition"] == 0.0


class Rows:
    """Stands in for verl's DataProto: tensors in ``batch``, one row of it by its number."""

    def __init__(self, batch: Mapping[str, torch.Tensor], columns: Mapping[str, Sequence[Any]]) -> None:
        self.batch, self.non_tensor_batch = dict(batch), dict(columns)

    def __getitem__(self, row: int) -> Rows:
        return Rows(
            {name: one[row] for name, one in self.batch.items()},
            {name: one[row] for name, one in self.non_tensor_batch.items()},
        )


def sampled(folder: Path) -> list[Rows]:
    """The answers to the file's first prompts, each in a batch of its own as verl's agent loop makes them."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "start")
    rows = []
    for prompt, text in zip(prompts_of(folder, "chat"), ANSWERS, strict=True):
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        said = [*tokenizer(text, add_special_tokens=False)["input_ids"], 2]
        padded = {"prompts": [0, 0, *ids], "responses": [*said, 0], "attention_mask": [0, 0, *[1] * len(ids + said), 0]}
        columns = {"raw_prompt": [prompt], "__num_turns__": [2], "reward_model": [{"ground_truth": None}]}
        rows.append(Rows({name: torch.tensor([one]) for name, one in padded.items()}, columns))
    return rows


def managed(folder: Path, **settings: Any) -> verl_worker.AttentionRewardManager:
    """A manager as verl makes it."""
    config = SimpleNamespace(reward={"reward_kwargs": {"config": str(folder / "chat.yaml"), **settings}})
    return verl_worker.AttentionRewardManager(
        config=config, tokenizer=None, compute_score=None, reward_router_address=None, reward_model_tokenizer=None
    )


def test_verls_reward_manager_judges_the_sampled_tokens_together(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    terms = FrozenScorer.terms

    def counted(self: FrozenScorer, prompts: Any, responses: Any) -> Any:
        batches.append(len(responses))
        return terms(self, prompts, responses)

    monkeypatch.setattr(FrozenScorer, "terms", counted)
    manager, rows = managed(workplace), sampled(workplace)
    spoilt = sampled(workplace)[0]
    spoilt.batch["prompts"] = spoilt.batch["prompts"] + 1

    async def asked() -> list[Any]:
        return await asyncio.gather(*map(manager.run_single, [*rows, spoilt]), return_exceptions=True)

    *found, refused = asyncio.run(asked())
    wanted = expected(workplace, "chat")
    for key, values in wanted.items():
        assert [row["reward_extra_info"][key] for row in found] == pytest.approx(values, abs=1e-5), key
    assert [row["reward_score"] for row in found] == pytest.approx(wanted["score"], abs=1e-5)
    assert batches == [3]  # one pass for all that were asked at once; the one that can't be judged spoils none
    assert isinstance(refused, DataError)
    assert "a model of the same tokenizer and chat template" in str(refused)
    # Rewards stand at the last token that was sampled.
    rewards = manager.assemble_rm_scores(rows[1], [0.5])
    assert rewards.shape == rows[1].batch["responses"].shape
    assert rewards[0, -2:].tolist() == [0.5, 0.0]
    assert rewards.sum() == 0.5


def test_verls_rows_that_the_manager_can_not_judge(workplace: Path) -> None:
    row, *_ = sampled(workplace)
    # Where verl pads trajectories of several lengths on the right it says how long they are.
    lengths = {"prompt_len": [3], "response_len": [2]}
    asked = verl_worker.asked_of(Rows(row.batch, row.non_tensor_batch | lengths)[-1])
    assert asked.prompt_ids == tuple(row.batch["prompts"][0, :3].tolist())
    assert asked.answer_ids == tuple(row.batch["responses"][0, :2].tolist())
    with pytest.raises(DataError, match="an answer of 4 turns"):
        verl_worker.asked_of(Rows(row.batch, row.non_tensor_batch | {"__num_turns__": [4]})[-1])
    with pytest.raises(DataError, match="no raw_prompt"):
        verl_worker.asked_of(Rows(row.batch, {})[-1])


@pytest.mark.timeout(600)  # four processes import torch and verl
def test_verls_own_reward_loop_takes_the_manager(tmp_path: Path) -> None:
    """verl's configuration, its RewardLoopManager, two of its workers in Ray, and one worker with the model."""
    for module in ("verl", "ray"):
        if not is_installed(module):
            pytest.skip(f"{module} is not installed")
    arguments = ("-m", "examples.integrations.verl_worker", "--output_dir", str(tmp_path))
    told = apart.finish(apart.python(*arguments, environment={"RAY_AUTH_MODE": "disabled"}), 540)
    assert re.search(r"workers: cagsr-reward-\w+, reward_loop_worker_0, reward_loop_worker_1\n", told)
    assert re.search(r"'the small red cat sees a house': score \S+, grounded_coverage \S+, .*; at token 7\n", told)
    assert re.search(r"'a dog likes food , a dog likes food , .*: .*, repetition 0\.[1-9]\d*.*; at token 14\n", told)


@pytest.mark.parametrize("name", ["plain", "chat"])
def test_openrlhf_gets_the_scorers_values(workplace: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(workplace / f"{name}.yaml"))
    reward_func = by_path("openrlhf").reward_func
    tokenizer = AutoTokenizer.from_pretrained(workplace / "start")
    given = prompts_of(workplace, name)
    if name == "chat":
        given = [tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True) for one in given]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ANSWERS]
    ids = [[*one, 2] if row != 1 else one for row, one in enumerate(ids)]  # the second was cut
    queries = [
        tokenizer.decode(tokenizer(prompt, add_special_tokens=False)["input_ids"] + one, skip_special_tokens=False)
        for prompt, one in zip(given, ids, strict=True)
    ]
    found = reward_func(queries, given, [None] * 3)
    wanted = expected(workplace, name, ids)
    assert set(found) == {"rewards", "scores", "extra_logs"}
    assert found["rewards"].shape == found["scores"].shape == (3,)
    assert found["rewards"].tolist() == pytest.approx(wanted.pop("score"), abs=1e-5)
    assert torch.equal(found["rewards"], found["scores"])
    assert {key: pytest.approx(values.tolist(), abs=1e-5) for key, values in found["extra_logs"].items()} == wanted
    # OpenRLHF's executor: one answer at a time, by position.
    alone = [reward_func([q], [p], [None])["rewards"].item() for q, p in zip(queries, given, strict=True)]
    assert alone == pytest.approx(found["rewards"].tolist(), abs=1e-5)
    with pytest.raises(DataError, match="does not begin with its prompt"):
        reward_func(["a bird"], given[:1], [None])
    assert reward_func([given[0]], given[:1], [None])["rewards"].isfinite().all()  # no answer at all


def test_openrlhf_knows_the_templates_words(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of text that OpenRLHF makes a user's message of, and prompts that no file tells anything of."""
    tokenizer = AutoTokenizer.from_pretrained(workplace / "start")
    (chat, *_) = prompts_of(workplace, "chat")
    given = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    query = given + ANSWERS[0]
    reward_func = by_path("openrlhf").reward_func
    found = {}
    for name in ("plain", "chat"):  # the same prompts
        monkeypatch.setenv(VARIABLE, str(workplace / f"{name}.yaml"))
        found[name] = reward_func([query], [given], [None])["extra_logs"]["grounded_coverage"].item()
        with pytest.raises(DataError, match=r"'another prompt' is none of data\.path"):
            reward_func(["another prompt a cat"], ["another prompt"], [None])
    assert found["plain"] == pytest.approx(found["chat"], abs=1e-6)


def test_the_signatures_are_those_of_verl_and_openrlhf() -> None:
    score = inspect.signature(by_path("verl").compute_score)
    assert list(score.parameters) == ["data_source", "solution_str", "ground_truth", "extra_info", "kwargs"]
    assert score.parameters["extra_info"].default is None
    assert not inspect.iscoroutinefunction(by_path("verl").compute_score)
    assert list(inspect.signature(by_path("openrlhf").reward_func).parameters) == [
        "queries",
        "prompts",
        "labels",
        "kwargs",
    ]


def test_settings_that_can_not_be_kept_are_refused(workplace: Path, tmp_path: Path) -> None:
    compute_score = by_path("verl").compute_score
    start = f"model: {{path: {workplace / 'start'}, device: cpu}}\n"
    cases = {
        "normalize: none": start + f"data: {{path: {workplace / 'plain.jsonl'}}}\n",
        "idf counts words": start + "reward: {normalize: none}\n",
        "unknown key": start + "rewards: {normalize: none}\n",
        "data.system_prompt is a setting of cagsr train": start
        + f"data: {{path: {workplace / 'plain.jsonl'}, system_prompt: be brief}}\nreward: {{normalize: none}}\n",
    }
    for number, (sentence, text) in enumerate(cases.items()):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        with pytest.raises(ConfigError, match=sentence):
            compute_score("tiny", "a cat", None, {"prompt": "tell me about the cat"}, config=str(file))
