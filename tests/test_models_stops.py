"""What ends an answer: read off the chat template, given as a stop string, and the same in sft, generate, train and final/."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import real_pipelines
import tiny
from cagsr.commands.main import main
from cagsr.config import DataConfig, ModelConfig, MonitorConfig, SalienceConfig, SamplingConfig, SftConfig
from cagsr.errors import ConfigError
from cagsr.models.load import LoadedModel, load_model
from cagsr.models.stops import TurnEnd, split_stop_strings, stop_tokens, turn_end
from cagsr.pairs import encode_pairs
from cagsr.prompts.batch import collate_prompts
from cagsr.prompts.prepare import encode_texts, prepare_prompts
from cagsr.rollout.sample import sample_responses
from cagsr.rollout.vllm_protocol import completion_request
from cagsr.sft import sft
from cagsr.training.monitors import Monitors

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }} </s>{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
GLM = (  # the next turn's marker is what ends an answer
    "{% for m in messages %}{{ '<|im_start|>' if m.role == 'user' else '<|im_end|>' }}\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|>\n{% endif %}"
)
SEVERAL = CHATML.replace("{{ m.content }}<|im_end|>\n", "{{ m.content }}\n### End <|im_end|></s>\n")
HUMAN = (
    "{% for m in messages %}{{ '\n\nHuman: ' if m.role == 'user' else '\n\nAssistant: ' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}\n\nAssistant: {% endif %}"
)
SYSTEM_FIRST = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
BROKEN = "{% for m in messages %}{{ m.nothing.more }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return real_pipelines.gpt2()


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    tokenizer.chat_template = template
    return tokenizer


# ---- the template ----


@pytest.mark.parametrize(
    ("template", "lead", "gap", "stop"),
    [
        (CHATML, "", "", "<|im_end|>"),
        (SYSTEM_FIRST, "", "", "<|im_end|>"),
        (LLAMA2, " ", " ", "</s>"),
        (PHI3, "", "", "<|im_end|>"),
        (GLM, "", "", "<|im_start|>"),
        (SEVERAL, "", "\n### End ", "<|im_end|>"),
        (HUMAN, "", "", None),
    ],
)
def test_how_a_template_surrounds_an_answer(
    tokenizer: PreTrainedTokenizerFast, template: str, lead: str, gap: str, stop: str | None
) -> None:
    end = turn_end(with_template(tokenizer, template))
    assert end is not None
    assert (end.lead, end.gap) == (lead, gap)
    assert end.stop == (None if stop is None else tokenizer.convert_tokens_to_ids(stop))


def test_a_template_that_renders_nothing_tells_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    assert turn_end(with_template(tokenizer, BROKEN)) is None
    assert stop_tokens(None, tokenizer) == (tokenizer.eos_token_id,)


def test_a_marker_may_be_an_ordinary_added_token_but_never_the_unknown_one() -> None:
    words = tiny.tokenizer()
    words.chat_template = CHATML
    assert words("<|im_end|>", add_special_tokens=False)["input_ids"].count(words.unk_token_id)
    assert turn_end(words) is not None
    assert turn_end(words).stop is None  # type: ignore[union-attr]
    words.add_tokens(["<|im_end|>"])
    words.chat_template = CHATML + " "  # what is found out is kept with the template
    end = turn_end(words)
    assert end is not None
    assert end.stop == words.convert_tokens_to_ids("<|im_end|>") == len(words) - 1


def test_stop_tokens_in_their_order_without_repetitions(tokenizer: PreTrainedTokenizerFast) -> None:
    with_template(tokenizer, CHATML)
    eos, end = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_tokens(GenerationConfig(eos_token_id=7), tokenizer) == (7, eos, end)
    assert stop_tokens(GenerationConfig(eos_token_id=[end, eos]), tokenizer) == (end, eos)


def test_what_is_cut_behind_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    end = turn_end(with_template(tokenizer, PHI3))
    assert isinstance(end, TurnEnd)
    assert end.cut("yes<|im_end|>\n</s>") == "yes<|im_end|>"
    glm = turn_end(with_template(tokenizer, GLM))
    assert glm is not None
    assert glm.cut("\nyes") == "\nyes<|im_start|>"
    human = turn_end(with_template(tokenizer, HUMAN))
    assert human is not None
    assert human.cut("yes") == "yes"


# ---- stop strings ----


def test_a_stop_string_that_is_a_special_token_is_an_id(tokenizer: PreTrainedTokenizerFast) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert split_stop_strings(tokenizer, ["\n", "<|im_end|>", "."]) == ((end,), ("\n", "."))
    with pytest.raises(ConfigError, match=r"give '<\|im_end\|>' alone"):
        split_stop_strings(tokenizer, ["<|im_end|>\n"])


def test_it_ends_answers_in_rollouts_and_in_vllms_requests(tmp_path: Path) -> None:
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path)), device="cpu"))
    sampling = SamplingConfig(num_generations=16, max_new_tokens=24, stop_strings=["<unk>", "dog"])
    ids, texts = loaded.stops(sampling)
    assert (ids, texts) == ((2, 3), ("dog",))
    prompts = encode_texts(["the red cat"], loaded.tokenizer, SalienceConfig(), 32)
    torch.manual_seed(0)
    rollout = sample_responses(loaded, _batch(loaded, prompts, 16), sampling)
    said = (rollout.ids == 3) & rollout.sampled
    assert said.any()  # this random model says it
    last = rollout.sampled.sum(dim=1) - 1
    assert (said.nonzero()[:, 1] == last[said.any(dim=1)]).all()  # and nothing behind it
    assert rollout.ended[said.any(dim=1)].all()
    assert completion_request("m", [], sampling, ids)["stop_token_ids"] == [2, 3]


# ---- end to end ----

CHAT_WORDS = (
    "{% for m in messages %}<|turn|> {{ 'tell me' if m.role == 'user' else 'the' }} {{ m.content }} <|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|> the{% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template ends turns with <|im_end|>, while its EOS is <eos> and its generation config knows that alone."""
    folder = tiny.save_model(tmp_path_factory.mktemp("base"), scale=1.0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT_WORDS
    tokenizer.save_pretrained(folder)
    return folder


def chats(path: Path, answers: Sequence[Any] = ("red cat", "blue dog")) -> Path:
    rows = [
        {"prompt": [{"role": "user", "content": f"about {word}"}], "completion": answer}
        for word in ("food", "area")
        for answer in answers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def taught(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    data = DataConfig(str(chats(folder / "chats.jsonl")))
    config = SftConfig(
        ModelConfig(str(base), device="cpu"),
        data,
        str(folder / "out"),
        batch_size=4,
        steps=60,
        learning_rate=1e-2,
        save_every=0,
    )
    return sft(config, quiet=True)


def test_what_the_template_ends_with_is_a_stop_token_and_is_said(base: Path) -> None:
    loaded = load_model(ModelConfig(str(base), device="cpu"))
    end = loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert loaded.stop_ids == (2, end)
    assert any("'<|im_end|>' ends answers too" in note for note in loaded.notes)


def test_a_model_taught_by_sft_stops_in_generate(taught: Path, tmp_path: Path) -> None:
    asked = chats(tmp_path / "asked.jsonl", answers=("x",))
    out = tmp_path / "answers.jsonl"
    arguments = ["--model", str(taught), "--data", str(asked), "--output", str(out), "--model.device", "cpu"]
    assert main(["generate", *arguments, "--num_generations", "4", "--max_new_tokens", "8"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(row["ended"] and row["tokens"] == 3 for row in rows)
    assert {row["completion"] for row in rows} <= {"red cat", "blue dog", "red dog", "blue cat"}


def test_the_saved_model_stops_by_itself(taught: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(taught), AutoModelForCausalLM.from_pretrained(taught)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in json.loads((taught / "generation_config.json").read_text())["eos_token_id"]
    chat = [{"role": "user", "content": "about food"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert said.tolist()[-1] == end
    assert len(said) == 3


def test_train_sees_answers_end_and_its_final_model_knows_why(taught: Path, tmp_path: Path) -> None:
    asked, run = chats(tmp_path / "asked.jsonl", answers=("x", "y", "z")), tmp_path / "run"
    arguments = ["--model", str(taught), "--data", str(asked), "--output_dir", str(run), "--model.device", "cpu"]
    short = ["--run.steps", "1", "--run.batch_size", "2", "--sampling.num_generations", "2"]
    weighing = ["--salience.weighting", "uniform", "--sampling.max_new_tokens", "8", "--evaluation.held_out", "1"]
    assert main(["train", *arguments, *short, *weighing]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["response/ended"] == 1.0
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    named = json.loads((run / "final" / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in named


def test_sft_says_when_the_template_ends_nothing(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    for file in base.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHAT_WORDS.replace(" <|im_end|>\n", " ").replace("<|turn|> ", "")
    tokenizer.save_pretrained(tmp_path / "model")
    data = chats(tmp_path / "chats.jsonl")
    arguments = ["--model", str(tmp_path / "model"), "--data", str(data), "--output_dir", str(tmp_path / "out")]
    assert main(["sft", *arguments, "--model.device", "cpu", "--steps", "1", "--batch_size", "2"]) == 0
    assert "4 of 4 answers end with no token that generation stops at" in " ".join(capsys.readouterr().err.split())


def test_chat_prompts_say_it_too_with_what_follows_an_answer(tmp_path: Path) -> None:
    tokenizer = with_template(real_pipelines.gpt2(), HUMAN)
    data = DataConfig(str(chats(tmp_path / "chats.jsonl")))
    found = prepare_prompts(data, SalienceConfig(weighting="uniform"), tokenizer, max_length=64)
    (note,) = [note for note in found.notes if "never stop" in note]
    assert r"with --sampling.stop_strings (the template goes on with '\n\nHuman:')" in note
    tokenizer.chat_template = CHATML
    found = prepare_prompts(data, SalienceConfig(weighting="uniform"), tokenizer, max_length=64)
    assert not [note for note in found.notes if "never stop" in note]


def test_generate_and_the_monitor_say_that_nothing_ends(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats(tmp_path / "chats.jsonl")
    arguments = ["--model", str(base), "--data", str(tmp_path / "chats.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert (
        main(["generate", *arguments, "--model.device", "cpu", "--max_new_tokens", "1", "--sampling.temperature", "0"])
        == 0
    )
    assert "0% of the answers end by themselves" in " ".join(capsys.readouterr().err.split())
    monitors = Monitors(MonitorConfig(patience=2))
    assert monitors.observe(1, {"response/ended": 0.0}) == []
    (alert,) = monitors.observe(2, {"response/ended": 0.0})
    assert alert.name == "ended"
    assert "--sampling.stop_strings" in alert.sentence


def test_pairs_of_a_conversation_end_with_the_marker_and_nothing_behind_it(base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    data = DataConfig(str(chats(tmp_path / "chats.jsonl")))
    pairs, _ = encode_pairs(SftConfig(ModelConfig(str(base)), data, "out"), tokenizer, None)
    words = tokenizer.convert_ids_to_tokens(pairs[0].answer)
    assert words == ["red", "cat", "<|im_end|>"]


def _batch(loaded: LoadedModel, prompts: Sequence[Any], many: int) -> Any:
    repeated = [prompt for prompt in prompts for _ in range(many)]
    return collate_prompts(repeated, pad_token_id=loaded.pad_token_id, padding_side="left", device=loaded.device)
