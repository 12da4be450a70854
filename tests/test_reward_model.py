"""A tiny random sequence-classification model as a reward term."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from cagsr.config import GroundedCoverageConfig, RepetitionConfig, RewardConfig
from cagsr.errors import ModelError, RewardError
from cagsr.flow import Prompt, RewardBatch
from cagsr.prompts.answer_text import answered_messages
from cagsr.reward.build import build_reward
from cagsr.reward.model import encode_answered, load_reward_model
from cagsr.reward.terms.echo import EchoConfig

MakeBatch = Callable[..., RewardBatch]
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"


def save(path: Path, labels: int = 1, template: str | None = None, pad: bool = True, cls: type | None = None) -> Path:
    """Save a tiny model with a character tokenizer."""
    characters = ["<unk>", "<pad>", "</s>", *map(chr, range(32, 127))]
    raw = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", eos_token="</s>", pad_token="<pad>" if pad else None
    )
    tokenizer.chat_template = template
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(characters),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        num_labels=labels,
        initializer_range=0.3,
    )
    (cls or LlamaForSequenceClassification)(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def alone(path: Path, text: str) -> float:
    """The score of one text without any padding, from the last position's hidden state by hand."""
    model = LlamaForSequenceClassification.from_pretrained(path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        return float(model.score(model.model(ids).last_hidden_state[0, -1]))


def with_texts(batch: RewardBatch, texts: list[str], chat: bool = False) -> RewardBatch:
    prompts = batch.episodes.prompts.prompts
    if chat:
        prompts = tuple(replace(p, messages=({"role": "user", "content": "say it"},)) for p in prompts)
    episodes = batch.episodes
    return replace(
        batch,
        episodes=replace(episodes, completions=tuple(texts), prompts=replace(episodes.prompts, prompts=prompts)),
    )


TEXTS = [" a", " a longer answer", "", " mid answer"]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_do_not_depend_on_the_batch(tmp_path: Path, make_reward_batch: MakeBatch, batch_size: int) -> None:
    path = save(tmp_path / "rm")
    batch = with_texts(make_reward_batch(prompts=2, generations=2), TEXTS)
    term = replace(load_reward_model(str(path), "cpu"), batch_size=batch_size)
    assert term.name == "rm"
    rows = batch.episodes.prompts.prompts
    expected = [alone(path, p.text + text) for p, text in zip(rows, TEXTS, strict=True)]
    torch.testing.assert_close(term(batch), torch.tensor(expected), atol=1e-5, rtol=0)
    assert len(set(expected)) == 4


def test_chat_goes_through_its_own_template(tmp_path: Path, make_reward_batch: MakeBatch) -> None:
    path = save(tmp_path / "rm", template=TEMPLATE, pad=False)
    batch = with_texts(make_reward_batch(prompts=2, generations=2), TEXTS, chat=True)
    expected = [alone(path, f"[user] say it [assistant] {text} ") for text in TEXTS]
    torch.testing.assert_close(load_reward_model(str(path), "cpu")(batch), torch.tensor(expected), atol=1e-5, rtol=0)


def test_a_begun_answer_is_gone_on_with(tmp_path: Path) -> None:
    """A conversation that ends with the assistant is continued, so its answer is no second message."""
    messages = ({"role": "user", "content": "say it"}, {"role": "assistant", "content": "the red"})
    assert answered_messages(messages, [{"role": "assistant", "content": " cat"}]) == [
        messages[0],
        {"role": "assistant", "content": "the red cat"},
    ]
    assert answered_messages(messages[:1], [{"role": "assistant", "content": "cat"}]) == [
        messages[0],
        {"role": "assistant", "content": "cat"},
    ]
    assert messages[1]["content"] == "the red"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(save(tmp_path / "rm", template=TEMPLATE, pad=False))
    prompt = Prompt(1, "", messages=messages)
    expected = tokenizer("[user] say it [assistant] the red cat ", add_special_tokens=False)["input_ids"]
    assert encode_answered(prompt, " cat", tokenizer) == expected


def test_in_the_reward(tmp_path: Path, make_reward_batch: MakeBatch) -> None:
    path = save(tmp_path / "rm")
    config = RewardConfig(
        grounded_coverage=GroundedCoverageConfig(weight=0.0),
        repetition=RepetitionConfig(weight=0.0),
        echo=EchoConfig(weight=0.0),
        models=[str(path)],
        normalize="running",
    )
    reward = build_reward(config, device="cpu")(with_texts(make_reward_batch(prompts=2, generations=2), TEXTS))
    assert set(reward.terms) == {"rm"}
    assert float(reward.total.std(correction=0)) == pytest.approx(1.0, abs=1e-5)


def test_models_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load_reward_model(str(tmp_path / "nowhere"), "cpu")
    with pytest.raises(ModelError, match="3 outputs"):
        load_reward_model(str(save(tmp_path / "three", labels=3)), "cpu")
    with pytest.raises(ModelError, match=r"no weights for 'score\.weight'"):
        load_reward_model(str(save(tmp_path / "causal", cls=LlamaForCausalLM)), "cpu")
    pickled = save(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only pickled weights"):
        load_reward_model(str(pickled), "cpu")
    (pickled / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        load_reward_model(str(pickled), "cpu")
    bare = save(tmp_path / "bare")
    (bare / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="can't be loaded"):
        load_reward_model(str(bare), "cpu")


def test_texts_that_are_refused(tmp_path: Path, make_reward_batch: MakeBatch) -> None:
    term = load_reward_model(str(save(tmp_path / "rm")), "cpu")
    batch = make_reward_batch(prompts=2, generations=2)
    with pytest.raises(RewardError, match=r"at most 64 tokens.*row 2"):
        term(with_texts(batch, ["a", "a", "a", "x" * 60]))
    with pytest.raises(ModelError, match="no chat template"):
        term(with_texts(batch, TEXTS, chat=True))
