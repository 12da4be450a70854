"""The attention reward inside TRL's own trainers: they train, and the numbers are the scorer's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

import tiny
from cagsr.config import AttentionConfig, ModelConfig, RewardConfig, SalienceConfig
from cagsr.errors import ConfigError, DataError, RewardError
from cagsr.integrations.trl import STATE_KEY, AttentionReward
from cagsr.models.load import load_model
from cagsr.prompts.prepare import encode_texts
from cagsr.reward.answers import AnswerScorer
from cagsr.reward.weigh import weigh
from cagsr.scoring.answers import Response

TEXTS = [
    "tell me about the red cat near a house",
    "tell me about the blue dog near a tree , and the food",
    "tell me about the small bird",
    "the green area likes a big name",
]
CHAT = (
    "{% for m in messages %}<bos> {{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<bos> assistant {% endif %}"
)
ALGORITHMS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("trl") / "start")


def made(
    start: Path,
    folder: Path,
    reward: AttentionReward | None,
    *,
    algorithm: str = "grpo",
    prompts: list[Any] | None = None,
    columns: dict[str, Any] | None = None,
    lora: bool = False,
    chat: str | None = None,
    bind: bool = True,
    **settings: Any,
) -> Any:
    trainer_class, config_class = ALGORITHMS[algorithm]
    tokenizer = AutoTokenizer.from_pretrained(start)
    if chat is not None:
        tokenizer.chat_template = chat
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
    args = config_class(output_dir=str(folder), **{**defaults, **settings})
    trainer = trainer_class(
        model=model,
        reward_funcs=reward or (lambda completions, **_: [0.0] * len(completions)),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts or TEXTS, **(columns or {})}),
        eval_dataset=Dataset.from_dict({"prompt": (prompts or TEXTS)[:2]}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear") if lora else None,
    )
    if reward is not None and bind:
        reward.bind(trainer)
    return trainer


def sampled(count: int = 4) -> list[list[int]]:
    """Answers of different lengths; the odd ones end with EOS (id 2)."""
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(4, 28, (1 + (3 * row) % 6,), generator=g).tolist() for row in range(count * len(TEXTS))]
    return [[*one, 2] if row % 2 else one for row, one in enumerate(ids)]


def given(trainer: Any, prompts: list[Any] | None = None) -> dict[str, Any]:
    prompts = prompts or TEXTS
    ids = sampled()
    texts = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
    chat = not isinstance(prompts[0], str)
    return {
        "prompts": [prompt for prompt in prompts for _ in range(4)],
        "completions": [[{"role": "assistant", "content": text}] for text in texts] if chat else texts,
        "completion_ids": ids,
        "trainer_state": trainer.state,
    }


def expected(start: Path, reward: RewardConfig, texts: list[Any], chat: str | None = None) -> dict[str, torch.Tensor]:
    """The scorer's raw terms for the same pairs, from the model's folder."""
    loaded = load_model(ModelConfig(str(start), device="cpu"), for_training=False)
    if chat is not None:
        loaded.tokenizer.chat_template = chat
    scorer = AnswerScorer(loaded, reward, AttentionConfig(), SalienceConfig())
    encoded = encode_texts(texts, loaded.tokenizer, SalienceConfig(), 50)
    prompts = [one for one in encoded for _ in range(4)]
    responses = [Response("", tuple(ids), ids[-1] == 2) for ids in sampled()]
    values = [found for _, found in scorer.score_texts(prompts, responses)]
    return {name: torch.cat([one[name] for one in values]) for name in values[0]}


FOUR_TERMS = RewardConfig(
    focus=replace(RewardConfig().focus, weight=0.5), self_certainty=replace(RewardConfig().self_certainty, weight=0.2)
)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
@pytest.mark.parametrize("lora", [False, True])
def test_trl_trains_with_the_attention_reward(start: Path, tmp_path: Path, algorithm: str, lora: bool) -> None:
    reward = AttentionReward()
    trainer = made(start, tmp_path, reward, algorithm=algorithm, lora=lora)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 2
    moved = [name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])]
    assert moved
    rows = [row for row in trainer.state.log_history if "reward" in row]
    assert len(rows) == 2
    for row in rows:
        assert 0 < row["attention_reward/grounded_coverage"] < 1
        assert row["rewards/attention_reward/mean"] == pytest.approx(0.0, abs=1e-5)  # centred within prompts
        assert row["rewards/attention_reward/std"] > 0.1
    assert trainer.model.training


@pytest.mark.parametrize(("kind", "conversational"), [("llama", False), ("llama", True), ("gpt2", False)])
def test_the_values_are_those_of_the_scorer(start: Path, tmp_path: Path, kind: str, conversational: bool) -> None:
    # gpt2 has absolute positions: left padding without position_ids would show.
    start = start if kind == "llama" else tiny.save_model(tmp_path / "start", kind)
    prompts: list[Any] = [[{"role": "user", "content": text}] for text in TEXTS] if conversational else TEXTS
    chat = CHAT if conversational else None
    reward = AttentionReward(replace(FOUR_TERMS, normalize="none"), micro_batch_size=3)
    trainer = made(start, tmp_path, reward, prompts=prompts, chat=chat)
    raw = expected(start, FOUR_TERMS, prompts, chat)
    weights = {name: reward._scorer.weights.get(name, 0.0) for name in raw}
    total = weigh(raw, weights, RewardConfig(normalize="none"), torch.zeros(16)).total
    assert reward(**given(trainer, prompts)) == pytest.approx(total.tolist(), abs=1e-5)
    assert len({round(value, 6) for value in total.tolist()}) > 10


def test_the_default_is_normalised_within_prompts_as_in_cagsr(start: Path, tmp_path: Path) -> None:
    reward = AttentionReward(FOUR_TERMS)
    trainer = made(start, tmp_path, reward)
    raw = {
        name: values for name, values in expected(start, FOUR_TERMS, TEXTS).items() if name in reward._scorer.weights
    }
    group = torch.arange(len(TEXTS)).repeat_interleave(4)
    weights = reward._scorer.weights
    # On the first batch the running scale is that batch's own.
    total = weigh(raw, weights, RewardConfig(), group).total
    trainer.model.train()
    first = reward(**given(trainer))
    assert first == pytest.approx(total.tolist(), abs=1e-4)
    assert torch.tensor(first).view(4, 4).mean(dim=1).abs().max() < 1e-5
    trainer.model.eval()  # evaluation: raw sums, and the scale stays
    count = reward._normalizer.within["grounded_coverage"].count
    raw_sum = sum(weights[name] * values for name, values in raw.items())
    assert reward(**given(trainer)) == pytest.approx(raw_sum.tolist(), abs=1e-5)
    assert reward._normalizer.within["grounded_coverage"].count == count == 12


def test_the_prompts_are_the_tokens_that_trl_feeds(start: Path, tmp_path: Path) -> None:
    for prompts, chat in ((TEXTS, None), ([[{"role": "user", "content": text}] for text in TEXTS], CHAT)):
        reward = AttentionReward()
        trainer = made(start, tmp_path, reward, prompts=prompts, chat=chat)
        fed = trainer._tokenize_prompts(prompts)[0]
        assert [list(reward._encoder.encode(prompt).ids) for prompt in prompts] == [list(ids) for ids in fed]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("source", ["policy", "reference"])
def test_a_call_leaves_the_model_as_it_was(start: Path, tmp_path: Path, lora: bool, source: Any) -> None:
    reward = AttentionReward(attention=AttentionConfig(source=source))
    trainer = made(start, tmp_path, reward, lora=lora)
    model = trainer.model
    model.train()
    frozen = next(module for module in model.modules() if not list(module.children()))
    frozen.training = False  # a module that stands out keeps its own flag
    flags = {name: module.training for name, module in model.named_modules()}
    gradients = {name: value.requires_grad for name, value in model.named_parameters()}
    ids = torch.tensor([[1, 4, 5, 6, 7]])
    state = torch.random.get_rng_state()
    with torch.no_grad():
        before = model(ids).logits
    reward(**given(trainer))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert {name: value.requires_grad for name, value in model.named_parameters()} == gradients
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(value.grad is None for value in model.parameters())


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_attention_of_the_reference_does_not_move(start: Path, tmp_path: Path, lora: bool, beta: float) -> None:
    def moved(source: Any) -> tuple[list[float], list[float]]:
        reward = AttentionReward(RewardConfig(normalize="none"), AttentionConfig(source=source))
        trainer = made(start, tmp_path, reward, lora=lora, beta=beta)
        # TRL's own reference is loaded from the path that the config names.
        first = reward(**given(trainer))
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.3)
        return first, reward(**given(trainer))

    first, second = moved("reference")
    assert second == first
    policy, moved_policy = moved("policy")
    assert policy == pytest.approx(first, abs=1e-5)  # at the start the two are one model
    assert moved_policy != pytest.approx(policy, abs=1e-3)


def test_a_reference_that_trl_moves_is_not_the_starting_model(start: Path, tmp_path: Path) -> None:
    reward = AttentionReward(RewardConfig(normalize="none"), AttentionConfig(source="reference"))
    trainer = made(start, tmp_path, reward, beta=0.1, sync_ref_model=True)
    first = reward(**given(trainer))
    with torch.no_grad():
        for parameter in trainer.accelerator.unwrap_model(trainer.ref_model).parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.3)
    assert reward(**given(trainer)) == first


def test_columns_reach_a_function_of_the_reward(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "of_columns.py").write_text(
        "def bonus(prompts, completions, completion_ids, level):\n    return [float(value) for value in level]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = RewardConfig(
        grounded_coverage=replace(RewardConfig().grounded_coverage, weight=0.0),
        repetition=replace(RewardConfig().repetition, weight=0.0),
        functions=["of_columns.bonus"],
        normalize="none",
    )
    reward = AttentionReward(config)
    trainer = made(start, tmp_path, reward, columns={"level": [1, 2, 3, 4]})
    assert reward(**given(trainer), level=list(range(16))) == [float(value) for value in range(16)]


def test_an_empty_answer_gets_none(start: Path, tmp_path: Path) -> None:
    reward = AttentionReward()
    trainer = made(start, tmp_path, reward)
    arguments = given(trainer)
    arguments["completion_ids"][3] = []
    values = reward(**arguments)
    assert values[3] is None
    assert all(isinstance(value, float) for row, value in enumerate(values) if row != 3)


def test_answers_to_a_prompt_may_be_spread_over_processes(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes with every other answer each: together they must give what one process gives."""
    whole = AttentionReward()
    trainer = made(start, tmp_path, whole)
    arguments = given(trainer)
    at_once = whole(**arguments)
    halves = [
        {k: v[rank::2] if isinstance(v, list) else v for k, v in arguments.items()} for rank in (0, 1)
    ]  # fmt: skip
    sent: list[Any] = []
    reward = AttentionReward()
    trainer = made(start, tmp_path, reward)
    monkeypatch.setattr("cagsr.integrations.trl.gather_object", lambda one: sent.extend(one) or sent[-1:])
    for half in halves:
        reward(**half)
    both = list(sent)
    monkeypatch.setattr("cagsr.integrations.trl.gather_object", lambda one: both)
    found: list[Any] = [None] * 16
    for rank in (0, 1):
        reward = AttentionReward()
        trainer = made(start, tmp_path, reward)
        monkeypatch.setattr(type(trainer.accelerator), "process_index", property(lambda _, rank=rank: rank))
        found[rank::2] = reward(**halves[rank])
    assert found == pytest.approx(at_once, abs=1e-5)
    both[1] = ([], {}, "no words")
    with pytest.raises(RewardError, match="another process: no words"):
        reward(**halves[1])


def test_the_running_scale_is_kept_in_checkpoints(start: Path, tmp_path: Path) -> None:
    reward = AttentionReward()
    settings = {"save_strategy": "steps", "save_steps": 1}
    made(start, tmp_path, reward, **settings).train()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"][STATE_KEY] == reward._normalizer.state_dict()
    again = AttentionReward()
    trainer = made(start, tmp_path, again, **{**settings, "max_steps": 3})
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    count = reward._normalizer.within["grounded_coverage"].count
    assert again._normalizer.within["grounded_coverage"].count == pytest.approx(count * 3 / 2)


def test_evaluation_logs_raw_sums(start: Path, tmp_path: Path) -> None:
    trainer = made(start, tmp_path, AttentionReward(), per_device_eval_batch_size=4)
    found = trainer.evaluate()
    assert 0 < found["eval_rewards/attention_reward/mean"] < 1
    assert found["eval_attention_reward/grounded_coverage"] > 0


def test_what_can_not_work_is_refused(start: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bind"):
        AttentionReward()(prompts=["a"], completions=["b"], completion_ids=[[4]])
    with pytest.raises(ConfigError, match="without spans"):
        made(start, tmp_path, AttentionReward(salience=SalienceConfig(weighting="spans")))
    with pytest.raises(ConfigError, match=r"associations\.json"):
        made(
            start,
            tmp_path,
            AttentionReward(RewardConfig(unsupported=replace(RewardConfig().unsupported, weight=-1.0))),
        )
    with pytest.raises(DataError, match="row 2"):
        made(start, tmp_path, AttentionReward(), prompts=[TEXTS[0], " . , ", *TEXTS[2:]])
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "a cat"}] for text in TEXTS]
    with pytest.raises(DataError, match="ends with the assistant"):
        made(start, tmp_path, AttentionReward(), prompts=chats, chat=CHAT)
    trainer = made(start, tmp_path, None)
    trainer.rollout_func = lambda prompts, trainer: {}
    with pytest.raises(ConfigError, match="leave out rollout_func"):
        AttentionReward().bind(trainer)
    with pytest.raises(ConfigError, match="every weight is 0"):
        AttentionReward(
            RewardConfig(
                grounded_coverage=replace(RewardConfig().grounded_coverage, weight=0.0),
                repetition=replace(RewardConfig().repetition, weight=0.0),
            )
        )
