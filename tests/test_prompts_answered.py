"""What follows a conversation's prompt when it is answered: the words of a rollout, whatever its chat template drops."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cagsr.config import DataConfig, SalienceConfig
from cagsr.errors import DataError
from cagsr.flow import Prompt
from cagsr.pairs import encode_answer
from cagsr.prompts.answer_text import text_after
from cagsr.prompts.encode import TextEncoder
from cagsr.prompts.render import render_prompt
from cagsr.prompts.rows import Row
from cagsr.reward.model import encode_answered
from prompts_tokenizers import byte_bpe

R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}<|im_start|>bot\n"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>bot\n<think>\n{% endif %}"
)
"""DeepSeek-R1's: a finished turn loses its thoughts, a new one begins with <think>."""
EMPTY_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think></think>{% endif %}"
)
"""A generation prompt with a closed block that finished turns lack (Gemma 4)."""
TOOLS = (
    "{% if tools %}can {{ tools[0].function.name }}. {% endif %}{% if mode is defined %}mode {{ mode }}. {% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content or 'nothing' }}"
    "{% for call in m.tool_calls or [] %} calls {{ call.function.name }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
TOOL = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
CALL: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather"}}]}
USER = {"role": "user", "content": "the cat"}


def with_template(template: str) -> Any:
    tokenizer = byte_bpe(chat=True)
    tokenizer.chat_template = template
    return tokenizer


def rendered(row: dict[str, Any], tokenizer: Any) -> Prompt:
    return render_prompt(Row(1, "p.jsonl", row), DataConfig(path="p.jsonl"), SalienceConfig(), tokenizer)


def answer(content: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": content, **more}]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # written as R1 writes it: the block that the prompt has opened is not opened twice, the thoughts stay
        (answer("<think>\nhm\n</think>\n\nred"), "hm\n</think>\n\nred<|im_end|>"),
        (answer("hm\n</think>\n\nred"), "hm\n</think>\n\nred<|im_end|>"),
        # no thoughts: the block is closed, so that the answer is no thought
        (answer("red"), "\n</think>\n\nred<|im_end|>"),
        (answer("<b>red</b>"), "\n</think>\n\n<b>red</b><|im_end|>"),
        (answer("red", reasoning_content="hm"), "hm\n</think>\n\nred<|im_end|>"),
        (answer([{"type": "text", "text": "red"}]), "\n</think>\n\nred<|im_end|>"),
    ],
)
def test_an_answer_stands_behind_the_thoughts_that_a_rollout_opens(given: Any, expected: str) -> None:
    tokenizer = with_template(R1)
    prompt = rendered({"prompt": [USER], "completion": given}, tokenizer)
    assert prompt.text.endswith("bot\n<think>\n")
    assert text_after(prompt, given, tokenizer, "row 1") == expected
    ids = encode_answer(prompt, "completion", TextEncoder(tokenizer), "row 1")
    assert tokenizer.decode(ids) == expected


def test_thoughts_that_a_template_drops_are_learnt_all_the_same() -> None:
    tokenizer = with_template(R1.replace("<think>\\n", ""))
    prompt = rendered({"prompt": [USER]}, tokenizer)
    assert text_after(prompt, answer("hm</think>red"), tokenizer, "row 1") == "hm</think>red<|im_end|>"


def test_a_closed_block_of_the_generation_prompt_is_the_prompts() -> None:
    tokenizer = with_template(EMPTY_THOUGHTS)
    prompt = rendered({"prompt": [USER]}, tokenizer)
    assert text_after(prompt, answer("red"), tokenizer, "row 1") == "red<|im_end|>\n"


def test_a_prefill_is_gone_on_with() -> None:
    tokenizer = byte_bpe(chat=True)
    prompt = rendered({"prompt": [USER, *answer("it is")]}, tokenizer)
    assert prompt.text.endswith("assistant\nit is")
    assert text_after(prompt, answer(" red"), tokenizer, "row 1") == " red<|im_end|>\n"


def test_an_answer_of_several_messages_needs_a_template_that_keeps_the_prompt() -> None:
    several = [CALL, {"role": "tool", "content": "sunny"}, *answer("red")]
    tokenizer = with_template(TOOLS)
    prompt = rendered({"prompt": [USER]}, tokenizer)
    assert text_after(prompt, several, tokenizer, "row 1") == (
        "nothing calls weather<|im_end|><|im_start|>tool: sunny<|im_end|><|im_start|>assistant: red<|im_end|>"
    )
    tokenizer = with_template(EMPTY_THOUGHTS)
    with pytest.raises(DataError, match=r"^row 1: the chat template writes the prompt differently"):
        text_after(rendered({"prompt": [USER]}, tokenizer), [*answer("a"), *answer("b")], tokenizer, "row 1")


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_template_settings_of_a_row_reach_every_rendering(as_text: bool) -> None:
    tokenizer = with_template(TOOLS)
    settings = {"mode": "brief", "unset": None}
    columns: dict[str, Any] = {"tools": TOOL, "chat_template_kwargs": settings}
    if as_text:
        columns = {name: json.dumps(value) for name, value in columns.items()}
    prompt = rendered({"prompt": [USER, CALL, {"role": "tool", "content": "sunny"}], **columns}, tokenizer)
    assert prompt.text == (
        "can weather. mode brief. <|im_start|>user: the cat<|im_end|><|im_start|>assistant: nothing calls weather<|im_end|>"
        "<|im_start|>tool: sunny<|im_end|><|im_start|>assistant: "
    )
    assert [prompt.text[a:b] for a, b in _contents(prompt)] == ["the cat", "sunny"]
    assert text_after(prompt, answer("red"), tokenizer, "row 1") == "red<|im_end|>"
    assert tokenizer.decode(encode_answered(prompt, "red", tokenizer)) == prompt.text + "red<|im_end|>"


def _contents(prompt: Prompt) -> list[tuple[int, int]]:
    ends = [0, *(end for _, end in prompt.template)]
    starts = [*(start for start, _ in prompt.template), len(prompt.text)]
    return [(a, b) for a, b in zip(ends, starts, strict=True) if a < b]


@pytest.mark.parametrize(
    ("columns", "part"),
    [
        ({"tools": "a hammer"}, "column 'tools' must hold a list of tools"),
        ({"tools": [3]}, "column 'tools' must hold a list of tools"),
        ({"chat_template_kwargs": "[1]"}, "column 'chat_template_kwargs' must hold an object"),
        ({"chat_template_kwargs": {"tokenize": True}}, "multiple values"),
    ],
)
def test_what_is_neither_is_named(columns: dict[str, Any], part: str) -> None:
    with pytest.raises(DataError, match=r"^p\.jsonl, row 1: ") as caught:
        rendered({"prompt": [USER], **columns}, with_template(TOOLS))
    assert part in str(caught.value)


def test_a_message_that_neither_speaks_nor_calls_is_refused() -> None:
    with pytest.raises(DataError, match=r"message 2 needs a role and a content"):
        rendered({"prompt": [USER, {"role": "assistant", "content": None}]}, with_template(TOOLS))
