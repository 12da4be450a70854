"""One tokeniser of prompt + answer: on the pipelines of real tokenizers, and by everything that encodes an answer."""

from __future__ import annotations

import dataclasses
import json
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import real_pipelines
import tiny
from cagsr.config import DataConfig, ModelConfig, SalienceConfig, SftConfig
from cagsr.evaluation.perplexity import mean_nll
from cagsr.flow import EncodedPrompt, Prompt, PromptBatch
from cagsr.integrations.openrlhf import _answer
from cagsr.models.continuation import continuation_text, encode_continuation
from cagsr.models.load import LoadedModel, load_model
from cagsr.models.stops import stop_tokens
from cagsr.pairs import encode_answer, encode_pairs
from cagsr.prompts.encode import TextEncoder, encode_prompt
from cagsr.prompts.render import render_prompt
from cagsr.prompts.rows import Row
from cagsr.quickstart.start_model import build_tokenizer
from cagsr.rollout.sample import cut_responses
from cagsr.scoring.answers import encode_response

PROMPTS = [
    "Description:",
    "Description: ",
    "12 + 30 =",
    "12",
    "Answer:\n",
    "Answer:\n\n",
    "Describe (",
    "The dog",
    "<|im_start|>assistant\n",
    "[INST] hi [/INST]",
    "Describe  ",
]
ANSWERS = [
    " The cat",
    "The cat",
    "  two",
    "42",
    "\nThe end",
    "\n\nThe end",
    "'s house",
    ")",
    ", and",
    " naïve 🙂",
    "🙂",
    "said",
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    found = {name: made() for name, made in real_pipelines.DECODERS.items()}
    gemma = Path(__file__).parents[2] / "gemma" / "gemma3-270m"  # ../shared/models/gemma.sh
    if gemma.is_dir():
        found["gemma3-270m"] = AutoTokenizer.from_pretrained(gemma)
    return found


def test_the_pipelines_have_the_spaces_of_the_real_ones(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    def pieces(name: str, text: str) -> list[str]:
        tokenizer = tokenizers[name]
        return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])

    for name in ("gpt2", "llama3", "qwen2"):
        assert (pieces(name, "The cat"), pieces(name, " The")) == (["The", "Ġcat"], ["ĠThe"])
    assert (pieces("gemma", "The cat"), pieces("gemma", " The")) == (["The", "▁cat"], ["▁The"])
    assert (pieces("llama2", "The cat"), pieces("llama2", " The")) == (["▁The", "▁cat"], ["▁", "▁The"])
    assert (pieces("mistral", "The cat"), pieces("mistral", " The")) == (["▁The", "▁cat"], ["▁The"])


def test_prompt_ids_and_answer_ids_read_as_prompt_and_answer(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    for (name, tokenizer), prompt, answer in product(tokenizers.items(), PROMPTS, ANSWERS):
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = encode_continuation(tokenizer, prompt, answer)
        assert tokenizer.decode(before + ids) == tokenizer.decode(before) + answer, (name, prompt, answer)
        assert continuation_text(tokenizer, ids) == answer, (name, prompt, answer)


@pytest.mark.parametrize(
    ("name", "prompt", "answer", "pieces"),
    [
        ("llama2", "Description:", " The cat", ["▁The", "▁cat"]),  # alone: ▁ ▁The, two spaces
        ("llama2", "Description:", "The cat", ["The", "▁cat"]),  # alone: ▁The, a space that nobody wrote
        ("llama2", "Description: ", "The cat", ["The", "▁cat"]),  # together the space would move into ▁The
        ("mistral", "assistant\n", "The cat", ["The", "▁cat"]),
        ("gpt2", "Description: ", "The cat", ["The", "Ġcat"]),
        ("llama3", "12", "30", ["3", "0"]),  # together the digits are grouped across the border
        ("gemma", "Description:", " The cat", ["▁The", "▁cat"]),
    ],
)
def test_first_pieces(
    tokenizers: dict[str, PreTrainedTokenizerFast], name: str, prompt: str, answer: str, pieces: list[str]
) -> None:
    ids = encode_continuation(tokenizers[name], prompt, answer)
    assert tokenizers[name].convert_ids_to_tokens(ids) == pieces


def test_a_vocabulary_of_whole_words_loses_none() -> None:
    tokenizer = build_tokenizer()  # the quickstart's: "▁Mara" is a token, "Mara" is none
    expected = tokenizer.convert_tokens_to_ids(["▁Mara", "▁is"])
    for prompt, answer in product(("name: Mara.", "name: Mara. "), (" Mara is", "Mara is")):
        assert encode_continuation(tokenizer, prompt, answer) == expected
    assert continuation_text(tokenizer, [*expected, tokenizer.eos_token_id]) == " Mara is"


# ---- one for all ----


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> dict[str, LoadedModel]:
    found = {}
    for name in real_pipelines.DECODERS:
        tokenizer = tokenizers[name]
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
        folder = tmp_path_factory.mktemp(name)
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found[name] = load_model(ModelConfig(str(folder), device="cpu"))
    return found


def asked(loaded: LoadedModel, prompt: str | list[dict[str, str]], **columns: str) -> EncodedPrompt:
    row = {"prompt": prompt, **columns}
    rendered = render_prompt(Row(1, "x", row), DataConfig("x"), SalienceConfig(), loaded.tokenizer)
    return EncodedPrompt(rendered, encode_prompt(rendered, TextEncoder(loaded.tokenizer)).ids, (), ())


def learnt(loaded: LoadedModel, prompt: EncodedPrompt) -> tuple[int, ...]:
    return tuple(encode_answer(prompt.prompt, "completion", TextEncoder(loaded.tokenizer), "here"))


@pytest.mark.parametrize("prompt", ["Description:", "Description: ", "Answer:\n"])
@pytest.mark.parametrize("answer", [" The cat", "The cat said 42"])
def test_what_is_learnt_is_what_is_scored_and_what_a_rollout_says(
    models: dict[str, LoadedModel], prompt: str, answer: str
) -> None:
    for name, loaded in models.items():
        encoded = asked(loaded, prompt, completion=answer)
        ids = learnt(loaded, encoded)
        assert ids[-1] == loaded.tokenizer.eos_token_id
        assert encode_response(loaded, encoded, answer).ids == ids, name
        # A policy that has learnt these tokens samples them: its answer is the text it was taught.
        rollout = cut_responses(torch.tensor([ids]), batch_of(encoded), loaded, loaded.stop_ids)
        assert rollout.completions == (answer,), name
        assert encode_response(loaded, encoded, rollout.completions[0]).ids == ids, name


@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>"), (LLAMA2, "</s>")])
def test_in_a_conversation_too(models: dict[str, LoadedModel], template: str, end: str) -> None:
    for name, loaded in models.items():
        loaded.tokenizer.chat_template = template
        messages = [{"role": "user", "content": "The dog"}]
        encoded = asked(loaded, messages, completion="The cat said")
        ids = learnt(loaded, encoded)
        assert loaded.tokenizer.convert_ids_to_tokens(ids[-1]) == end, name
        assert encode_response(loaded, encoded, "The cat said").ids == ids, name
        whole = loaded.tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": "The cat said"}], tokenize=False
        )
        read = loaded.tokenizer.decode([*encoded.ids, *ids])
        behind = whole.removeprefix(encoded.prompt.text).removesuffix("\n")
        assert read == loaded.tokenizer.decode(encoded.ids) + behind, name
        # Cut short it has no end; where the user's prompt begins the answer itself, it goes on without the template's space.
        cut = encode_response(loaded, encoded, "The cat", ended=False).ids
        assert cut == ids[: len(cut)], name
        loaded.tokenizer.chat_template = None


def test_an_answer_that_the_prompt_begins_goes_on(models: dict[str, LoadedModel]) -> None:
    loaded = models["llama2"]
    loaded.tokenizer.chat_template = LLAMA2
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The"}]
    encoded = asked(loaded, messages, completion=" cat")
    ids = learnt(loaded, encoded)
    assert loaded.tokenizer.decode([*encoded.ids, *ids]).endswith("[INST] hi [/INST] The cat </s>")
    assert encode_response(loaded, encoded, " cat").ids == ids
    loaded.tokenizer.chat_template = None


def test_an_encoder_decoders_answer_is_a_text_of_its_own(tmp_path: Path) -> None:
    tokenizer = real_pipelines.t5()
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path, "t5")), device="cpu"))
    loaded = dataclasses.replace(loaded, tokenizer=tokenizer)
    encoded = EncodedPrompt(Prompt(1, "Description:"), (5,), (-1,), ())
    ids = encode_response(loaded, encoded, "The cat").ids
    assert ids == (*tokenizer("The cat", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    assert tokenizer.convert_ids_to_tokens(ids[0]).startswith("▁")
    assert loaded.text_of(ids) == "The cat"


def test_a_file_of_pairs_gives_these_tokens(models: dict[str, LoadedModel], tmp_path: Path) -> None:
    row = {"prompt": "Description:", "completion": " The cat"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    loaded, data = models["llama2"], DataConfig(str(tmp_path / "rows.jsonl"))
    config = SftConfig(ModelConfig("x"), data, "out")
    (pair,), _ = encode_pairs(config, loaded.tokenizer, None)
    assert loaded.tokenizer.decode(pair.prompt + pair.answer, skip_special_tokens=True) == "Description: The cat"
    assert loaded.tokenizer.convert_ids_to_tokens(pair.answer)[-3:] == ["▁The", "▁cat", "</s>"]


def test_the_judge_reads_an_answer_behind_its_prompt(models: dict[str, LoadedModel]) -> None:
    loaded = models["llama2"]
    found = mean_nll(loaded.model, loaded.tokenizer, ["Description:"], [" The cat"])
    ids = loaded.tokenizer("Description: The cat")["input_ids"]  # the boundary falls between two tokens
    with torch.no_grad():
        logp = loaded.model(torch.tensor([ids])).logits[0, -3:-1].log_softmax(-1)
    assert found[0] == pytest.approx(-float(logp.gather(1, torch.tensor([ids[-2:]]).T).mean()), rel=1e-5)


def batch_of(encoded: EncodedPrompt) -> PromptBatch:
    ids = torch.tensor([encoded.ids])
    return PromptBatch(
        (encoded.prompt,),
        ids,
        torch.ones_like(ids, dtype=torch.bool),
        torch.full_like(ids, -1),
        torch.ones(1, 1),
        torch.zeros(1),
    )


def test_an_end_that_the_answer_writes_itself_is_the_one(models: dict[str, LoadedModel]) -> None:
    loaded = models["qwen2"]
    loaded.tokenizer.chat_template = CHATML
    loaded = dataclasses.replace(loaded, stop_ids=stop_tokens(None, loaded.tokenizer))
    end = loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")
    # A conversation that is written out as text ends as it is written, one of messages as its template does.
    written = asked(loaded, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", completion="The cat<|im_end|>")
    ids = learnt(loaded, written)
    assert (ids[-1], ids.count(end)) == (end, 1)
    assert encode_response(loaded, written, "The cat<|im_end|>").ids == ids
    messages = asked(loaded, [{"role": "user", "content": "hi"}])
    assert (
        encode_response(loaded, messages, "The cat").ids == encode_response(loaded, messages, "The cat<|im_end|>").ids
    )
    assert encode_response(loaded, messages, "The cat").ids[-1] == end
    loaded.tokenizer.chat_template = None


def test_openrlhf_scores_the_answer_behind_its_prompt(models: dict[str, LoadedModel]) -> None:
    loaded = models["llama2"]
    encoded = asked(loaded, "Description:")
    assert _answer(loaded.tokenizer, "Description: The cat</s>", "Description:", encoded) == list(
        encode_response(loaded, encoded, " The cat").ids
    )
