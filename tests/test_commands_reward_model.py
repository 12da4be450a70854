"""``cagsr reward-model``: what it learns, that it reads what scoring reads, and that ``train`` can use it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from examples.e2e.accuracy import accuracy
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import cagsr.preferences.reward_trainer as module
import tiny
from cagsr.commands.main import main
from cagsr.config import DataConfig, LoraConfig, ModelConfig, RewardModelConfig
from cagsr.errors import ConfigError, DataError, ModelError, RunError
from cagsr.flow import Prompt
from cagsr.preferences.pairs import PreferencePair, read_preferences
from cagsr.preferences.reward_trainer import pair_accuracy, train_reward_model
from cagsr.quickstart.start_model import build_tokenizer
from cagsr.reward.model import encode_answered, join_answer, load_reward_model

ANIMALS, COLOURS = ("cat", "dog", "bird", "tree"), ("red", "blue", "green", "small", "big")
ROWS = [
    {
        "prompt": f"tell me about the {colour} {animal} .",
        "chosen": f" the {colour} {animal} likes a house .",
        "rejected": f" the {colour} {animal} sees sees sees .",
    }
    for colour in COLOURS
    for animal in ANIMALS
]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("start"), scale=1.0)


@pytest.fixture
def config(start: Path, tmp_path: Path) -> RewardModelConfig:
    return RewardModelConfig(
        model=ModelConfig(str(start), device="cpu"),
        data=DataConfig(str(write_rows(tmp_path / "prefs.jsonl", ROWS))),
        output_dir=str(tmp_path / "rm"),
        batch_size=4,
        steps=30,
        learning_rate=5e-3,
        held_out=0.25,
        save_every=0,
    )


def metrics(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForSequenceClassification.from_pretrained(folder).state_dict())


# ---- what it reads ----


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        ("name: Mara =>", " Mara bakes.", "name: Mara => Mara bakes."),
        ("name: Mara =>", "Mara bakes.", "name: Mara => Mara bakes."),  # the space was lost in decoding
        ("Question?\n", "Answer.", "Question?\nAnswer."),
        ("The cat sat", ", then left", "The cat sat, then left"),
        ("He said (", "softly)", "He said (softly)"),
        ("天气", "很好", "天气很好"),
        ("name", "", "name"),
        ("", "text", "text"),
    ],
)
def test_prompt_and_answer_are_put_together(prompt: str, answer: str, text: str) -> None:
    assert join_answer(prompt, answer) == text


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "written"),
    [
        (build_tokenizer(), "name: Mara.", " Mara is a baker."),
        (tiny.tokenizer(), "tell me about the cat .", " the cat likes a house ."),
    ],
)
def test_a_sampled_answer_gives_the_tokens_of_the_written_one(tokenizer: Any, prompt: str, written: str) -> None:
    """Neither tokenizer gives back the space between prompt and answer when it decodes the answer alone."""
    ids = tokenizer(written, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    sampled = tokenizer.decode(ids, skip_special_tokens=True)
    assert not sampled.startswith(" ")
    asked = Prompt(row=1, text=prompt)
    ids = encode_answered(asked, sampled, tokenizer)
    assert ids == encode_answered(asked, written, tokenizer)
    assert tokenizer.unk_token_id not in ids


def test_training_reads_the_tokens_that_scoring_reads(
    config: RewardModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[list[int]] = []

    class Spy(module._Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
                fed.append(ids[mask.bool()].tolist())
                assert not mask[int(mask.sum()) :].any()  # padded on the right
            return super().compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(module, "_Trainer", Spy)
    end = {**ROWS[0], "rejected": ROWS[0]["rejected"] + "<eos>"}  # a written end token, as sft allows
    write_rows(Path(config.data.path), [end, *ROWS[1:]])
    folder = train_reward_model(replace(config, steps=None, epochs=1, held_out=0), quiet=True)
    scored: list[list[int]] = []
    model = load_reward_model(str(folder), "cpu")
    inner = model.model.forward

    def spy(**inputs: Any) -> Any:
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            scored.append(ids[mask.bool()].tolist())
        return inner(**inputs)

    model.model.forward = spy  # type: ignore[method-assign]
    prompts = [Prompt(row=1, text=row["prompt"]) for row in ROWS]
    for name in ("chosen", "rejected"):
        model.score(prompts, [row[name].lstrip() for row in ROWS])  # as a sampled answer looks
    assert sorted(fed) == sorted(scored)
    assert len(fed) == 2 * len(ROWS)


# ---- what it learns ----


def test_the_folder_holds_a_reward_model_that_has_learnt(config: RewardModelConfig) -> None:
    folder = train_reward_model(config, quiet=True)
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "metrics.json"} <= names
    assert "reward-model.yaml" in names
    assert not [name for name in names if name.endswith((".bin", ".pt")) or name[0] == "."]
    assert "checkpoints" not in names
    found = metrics(folder)
    assert found["pairs"] == 15
    assert (found["held_out"]["pairs"], found["held_out"]["prompts"]) == (5, 5)
    assert found["held_out"]["accuracy"]["mean"] == found["held_out"]["pair_accuracy"] == 1.0
    assert found["held_out"]["margin"] > 0.5
    card = (folder / "README.md").read_text()
    assert "1.000 [1.000, 1.000]" in card
    assert "5 pairs of prompts kept out" in card


def test_what_was_measured_is_what_the_saved_folder_gives(config: RewardModelConfig, tmp_path: Path) -> None:
    """With one step the accuracy is somewhere in between: the saved weights must give the very same."""
    other = write_rows(tmp_path / "other.jsonl", ROWS[::2])
    folder = train_reward_model(replace(config, steps=2, eval_data=str(other)), quiet=True)
    found = metrics(folder)["held_out"]
    again = accuracy(str(folder), str(other))
    assert (again.pairs, again.prompts) == (found["pairs"], found["prompts"]) == (10, 10)
    assert again.margin == pytest.approx(found["margin"], abs=1e-6)
    assert again.pair_accuracy == found["pair_accuracy"]
    assert found["prompts_also_trained_on"] == 10
    assert metrics(folder)["pairs"] == 20  # nothing is held out besides


def test_long_held_out_pairs_are_refused_or_dropped_before_training(
    config: RewardModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {**ROWS[0], "rejected": " cat" * 80}
    other = write_rows(tmp_path / "other.jsonl", [ROWS[1], long])
    config = replace(config, steps=1, eval_data=str(other))
    with pytest.raises(DataError, match=r"other\.jsonl, row 2: prompt and answer are \d+ tokens long, the limit is 64"):
        train_reward_model(config, quiet=True)
    assert not Path(config.output_dir).exists()
    folder = train_reward_model(replace(config, long_pairs="drop"))
    assert metrics(folder)["held_out"]["pairs"] == 1
    assert "1 held-out pairs are longer than 64 tokens" in capsys.readouterr().err
    write_rows(other, [long])
    with pytest.raises(DataError, match="all 1 pairs to measure on are longer than 64 tokens"):
        train_reward_model(replace(config, long_pairs="drop", overwrite=True), quiet=True)


def test_accuracy_is_a_mean_over_prompts() -> None:
    """Prompt a: one of two pairs right; prompt b: a tie. By prompt (0.5 + 0.5) / 2, by pair (1 + 0 + 0.5) / 3."""

    class Fake:
        class tokenizer:
            eos_token = None

        def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> torch.Tensor:
            return torch.tensor([float(answer) for answer in answers])

    a, b = Prompt(row=1, text="a"), Prompt(row=2, text="b")
    pairs = [PreferencePair(a, "3", "1", ""), PreferencePair(a, "1", "2", ""), PreferencePair(b, "4", "4", "")]
    found = pair_accuracy(Fake(), pairs)  # type: ignore[arg-type]
    assert found.accuracy.mean == 0.5
    assert found.accuracy.low == found.accuracy.high == 0.5
    assert found.pair_accuracy == 0.5
    assert found.margin == pytest.approx(1 / 3)
    found = pair_accuracy(Fake(), [*pairs, PreferencePair(a, "2", "1", "")])  # type: ignore[arg-type]
    assert found.accuracy.mean == pytest.approx((2 / 3 + 0.5) / 2)
    assert found.pair_accuracy == pytest.approx(2.5 / 4)
    assert (found.pairs, found.prompts) == (4, 2)


def test_fewer_pairs_are_a_part_of_more_and_never_held_out(
    config: RewardModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, tuple[list[str], list[str]]] = {}
    for count in (4, 8):
        training, held_out = module._divide(replace(config, num_pairs=count), tiny.tokenizer(), [])
        seen[count] = ([pair.where for pair in training], [pair.where for pair in held_out])
    assert seen[8][0][:4] == seen[4][0]
    assert seen[4][1] == seen[8][1]
    assert not set(seen[8][0]) & set(seen[8][1])
    assert metrics(train_reward_model(replace(config, num_pairs=4, steps=1), quiet=True))["pairs"] == 4


def test_the_start_is_the_models_body_and_the_seed_makes_the_head(config: RewardModelConfig, start: Path) -> None:
    first = weights(train_reward_model(replace(config, steps=1, learning_rate=1e-12), quiet=True))
    body = AutoModelForCausalLM.from_pretrained(start).model.state_dict()
    for name, value in body.items():
        torch.testing.assert_close(first[f"model.{name}"], value)
    again = weights(train_reward_model(replace(config, steps=1, overwrite=True, learning_rate=1e-12), quiet=True))
    other = weights(
        train_reward_model(replace(config, steps=1, overwrite=True, learning_rate=1e-12, seed=1), quiet=True)
    )
    assert torch.equal(first["score.weight"], again["score.weight"])
    assert not torch.equal(first["score.weight"], other["score.weight"])


def test_lora_leaves_a_merged_reward_model(config: RewardModelConfig, start: Path) -> None:
    folder = train_reward_model(replace(config, lora=LoraConfig(r=2), learning_rate=2e-2), quiet=True)
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    body, after = AutoModelForCausalLM.from_pretrained(start).model.state_dict(), weights(folder)
    assert set(after) == {*(f"model.{name}" for name in body), "score.weight"}
    moved = {name for name, value in body.items() if not torch.equal(value, after[f"model.{name}"])}
    assert moved
    assert all("_proj" in name for name in moved)
    assert accuracy(str(folder), config.data.path).pair_accuracy == 1.0


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_other_families(config: RewardModelConfig, tmp_path: Path, kind: str) -> None:
    start = tiny.save_model(tmp_path / kind, kind, scale=1.0)
    folder = train_reward_model(replace(config, model=ModelConfig(str(start), device="cpu")), quiet=True)
    assert accuracy(str(folder), config.data.path).pair_accuracy > 0.9


@pytest.mark.parametrize("saved", [2, 6])  # within the first epoch, and within the second
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(
    config: RewardModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: int
) -> None:
    short = replace(config, steps=saved + 2)
    whole = weights(train_reward_model(replace(short, output_dir=str(tmp_path / "whole")), quiet=True))

    class Stopped(module._Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == saved + 1:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    halves = replace(short, save_every=saved)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_Trainer", Stopped)
        with pytest.raises(KeyboardInterrupt):
            train_reward_model(halves, quiet=True)
    assert not (Path(config.output_dir) / "config.json").exists()
    with pytest.raises(RunError, match="--resume"):
        train_reward_model(halves, quiet=True)
    resumed = weights(train_reward_model(replace(halves, resume=True), quiet=True))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# ---- in the loop, and bad input ----


def test_train_uses_it(config: RewardModelConfig, start: Path, tmp_path: Path) -> None:
    folder = train_reward_model(config, quiet=True)
    prompts = tiny.save_prompts(tmp_path / "prompts.jsonl")
    run = tmp_path / "run"
    words = f"train --model {start} --data {prompts} --output_dir {run} --steps 2 --model.device cpu"
    words += f" --reward.grounded_coverage.weight 0 --reward.repetition.weight 0 --reward.models {folder}"
    words += " --sampling.num_generations 4 --sampling.max_new_tokens 6 --ppo.num_ppo_epochs 1 --ppo.estimator rloo"
    assert main(words.split()) == 0
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = [row["rewards/rm/mean"] for row in logged if "rewards/rm/mean" in row]
    assert len(values) >= 2
    assert all(value == value and value != 0 for value in values)
    assert (run / "final" / "config.json").exists()


def test_the_command_line_says_how_good_it_is(config: RewardModelConfig, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["reward-model", "--model", config.model.path, "--data", config.data.path]
    words += ["--output_dir", config.output_dir, "--steps", "1", "--batch_size", "4", "--model.device", "cpu"]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert "18 pairs" in captured.err
    assert "on 2 held-out pairs" in captured.out
    assert main(words) == 2
    assert "holds another reward-model" in capsys.readouterr().err


def test_what_is_refused(config: RewardModelConfig, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"prefs\.jsonl, row \d+: prompt and answer are \d+ tokens long, the limit is 5"
    ):
        train_reward_model(replace(config, max_length=5), quiet=True)
    with pytest.raises(DataError, match="were dropped"):
        train_reward_model(replace(config, max_length=5, long_pairs="drop"), quiet=True)
    with pytest.raises(ConfigError, match="--num_pairs"):
        train_reward_model(replace(config, num_pairs=16), quiet=True)
    seq2seq = tiny.save_model(tmp_path / "t5", "t5")
    with pytest.raises(ModelError, match="encoder-decoder"):
        train_reward_model(replace(config, model=ModelConfig(str(seq2seq), device="cpu")), quiet=True)
    with pytest.raises(DataError, match="No such file"):
        train_reward_model(replace(config, eval_data=str(tmp_path / "none.jsonl")), quiet=True)
    assert not Path(config.output_dir).exists()
    assert read_preferences(config, AutoTokenizer.from_pretrained(config.model.path))
