"""Rendering: TRL's columns, marked passages, chat templates and the ranges they write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cagsr.config import DataConfig, SalienceConfig
from cagsr.errors import ConfigError, DataError
from cagsr.flow import Prompt
from cagsr.prompts.render import render_prompt, text_of
from cagsr.prompts.rows import Row
from prompts_tokenizers import CHATML, byte_bpe, word_level

DATA = DataConfig(path="p.jsonl")
MARKED = SalienceConfig(markers=("<<", ">>"))
CHAT = byte_bpe(chat=True)


def render(row: Mapping[str, Any], data: DataConfig = DATA, salience: SalienceConfig = MARKED, tok=CHAT) -> Prompt:
    return render_prompt(Row(3, data.path, row), data, salience, tok)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def template_text(prompt: Prompt) -> str:
    return "".join(prompt.text[a:b] for a, b in prompt.template)


def test_plain_rows_keep_their_other_columns() -> None:
    prompt = render({"prompt": "the cat", "chosen": "a", "rejected": "b", "references": ["x", "y"], "mine": 3})
    assert (prompt.text, prompt.row, prompt.template, prompt.spans, prompt.messages) == ("the cat", 3, (), None, None)
    assert prompt.columns == {"chosen": "a", "rejected": "b", "references": ["x", "y"], "mine": 3}


def test_chat_template_ranges_are_all_but_the_contents() -> None:
    prompt = render({"prompt": [{"role": "system", "content": "be brief"}, user("  the cat ")]})
    assert prompt.text == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    )
    contents = prompt.text.replace("be brief", "").replace("the cat", "")
    assert template_text(prompt) == contents
    assert prompt.messages is not None
    assert [m["role"] for m in prompt.messages] == ["system", "user"]


def test_other_fields_of_messages_reach_the_template() -> None:
    """The policy of another loop sees tool calls and names; so must we. Arrow's None for what a message lacks is none."""
    tokenizer = byte_bpe(chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}{% if m.name is defined %} {{ m.name }}{% endif %}: {{ m.content }}"
        "{% for call in m.tool_calls %} calls {{ call.function.name }}{% endfor %} | {% endfor %}"
    )
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    messages = [
        {"role": "user", "content": "<<the cat>>", "name": "ann", "tool_calls": None},
        {"role": "assistant", "content": "", "name": None, "tool_calls": [call]},
        {"role": "user", "content": "go on", "name": None, "tool_calls": None},
    ]
    prompt = render({"prompt": messages}, tok=tokenizer)
    assert prompt.text == "user ann: the cat | assistant:  calls weather | user: go on | "
    assert prompt.spans == ((10, 17),)
    assert template_text(prompt) == "user ann:  | assistant:  calls weather | user:  | "


def test_a_content_that_reads_like_the_template_is_still_found() -> None:
    # Searching for "user" from the left would find the role marker.
    prompt = render({"prompt": [user("user"), {"role": "assistant", "content": "assistant"}, user("im_start")]})
    kept = [b for b in (prompt.text[a:b] for a, b in _gaps(prompt)) if b]
    assert kept == ["user", "assistant", "im_start"]
    assert prompt.text[prompt.template[0][1] - 5 : prompt.template[0][1]] == "user\n"


def _gaps(prompt: Prompt) -> list[tuple[int, int]]:
    ends = [0, *(b for _, b in prompt.template)]
    return [(a, b) for a, (b, _) in zip(ends, prompt.template, strict=False)]


@given(
    st.lists(
        st.text(alphabet="ab <>|\nuser", min_size=1, max_size=12).filter(lambda s: s.strip()), min_size=1, max_size=4
    )
)
def test_contents_are_found_whatever_they_say(contents: list[str]) -> None:
    roles = ["user", "assistant"] * 2
    messages = [{"role": role, "content": c} for role, c in zip(roles, contents, strict=False)]
    if messages[-1]["role"] == "assistant":
        messages.append(user("end"))
    prompt = render({"prompt": messages}, salience=SalienceConfig())
    written = "".join(f"<|im_start|>{m['role']}\n<|im_end|>\n" for m in messages) + "<|im_start|>assistant\n"
    assert template_text(prompt) == written


def test_a_conversation_that_ends_with_the_assistant_is_continued() -> None:
    prompt = render({"prompt": [user("the cat"), {"role": "assistant", "content": "It sat"}]})
    assert prompt.text.endswith("<|im_start|>assistant\nIt sat")


def test_a_template_that_rewrites_contents_falls_back_to_search() -> None:
    tok = byte_bpe()
    tok.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'][:4] + '..' + m['content'][4:] }}{% endfor %}"
    )
    prompt = render({"prompt": [user("abcdefgh")]}, tok=tok)
    assert prompt.text == "[user] abcd..efgh"
    assert template_text(prompt) == prompt.text  # not found: nothing of it is called salient
    with pytest.raises(DataError, match="changes the message with the marked passage"):
        render({"prompt": [user("<<abcd>>efgh")]}, tok=tok)


def test_system_prompt_is_put_first_and_counts_as_template() -> None:
    data = DataConfig(path="p.jsonl", system_prompt="You are kind.")
    prompt = render({"prompt": [user("the cat")]}, data)
    assert prompt.text.startswith("<|im_start|>system\nYou are kind.<|im_end|>")
    assert "You are kind." in template_text(prompt)
    own = render({"prompt": [{"role": "system", "content": "Mine."}, user("the cat")]}, data)
    assert "You are kind." not in own.text
    assert "Mine." not in template_text(own)


def test_markers_become_spans() -> None:
    prompt = render({"prompt": "tell <<Blue Spice>> and <<dog>>"})
    assert prompt.text == "tell Blue Spice and dog"
    assert prompt.spans == ((5, 15), (20, 23))
    assert render({"prompt": "none marked"}).spans is None


def test_markers_and_spans_in_conversations_land_on_the_same_characters() -> None:
    marked = render({"prompt": [user("<<hi>> you"), {"role": "assistant", "content": "ok"}, user("  a <<dog>> b")]})
    assert marked.spans is not None
    assert [marked.text[a:b] for a, b in marked.spans] == ["hi", "dog"]
    data = DataConfig(path="p.jsonl", spans_column="spans")
    row = {"prompt": [user("hi"), {"role": "assistant", "content": "ok"}, user("  a dog b")], "spans": [[4, 7]]}
    given_spans = render(row, data, SalienceConfig())
    assert given_spans.spans is not None
    assert [given_spans.text[a:b] for a, b in given_spans.spans] == ["dog"]


@pytest.mark.parametrize("text", ["a <<b", "a <<b <<c>>", "a >> b", "<<a>> b >> c", "a >> <<b>>"])
def test_markers_without_a_partner(text: str) -> None:
    with pytest.raises(DataError, match=r"p\.jsonl, row 3: .*marker"):
        render({"prompt": text})


def test_same_text_as_both_markers() -> None:
    prompt = render({"prompt": "a **b** c **d**"}, salience=SalienceConfig(markers=("**", "**")))
    assert (prompt.text, prompt.spans) == ("a b c d", ((2, 3), (6, 7)))


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([[0, 99]], r"row 3: the span \[0, 99\] does not lie in the prompt of 7 characters"),
        ([[3, 3]], "does not lie"),
        ([[-1, 2]], "does not lie"),
        ([[0, "2"]], "must hold character ranges"),
        ([0, 2], "must hold character ranges"),
        ("nonsense", "must hold character ranges"),
        (None, "must hold character ranges"),
    ],
)
def test_bad_spans(spans: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        render({"prompt": "the cat", "s": spans}, DataConfig(path="p.jsonl", spans_column="s"), SalienceConfig())


def test_spans_from_a_csv_are_json_text() -> None:
    data = DataConfig(path="p.jsonl", spans_column="s")
    assert render({"prompt": "the cat", "s": "[[4, 7]]"}, data, SalienceConfig()).spans == ((4, 7),)
    with pytest.raises(ConfigError, match="not both"):
        render({"prompt": "the cat", "s": []}, data, MARKED)
    with pytest.raises(DataError, match=r"no column 's'.*--data\.spans_column"):
        render({"prompt": "the cat"}, data, SalienceConfig())


def test_a_row_without_the_prompt_column() -> None:
    with pytest.raises(
        DataError, match=r"p\.jsonl, row 3: no column 'prompt' \(columns here: text, id\).*--data\.prompt_column"
    ):
        render({"text": "x", "id": 1})


@pytest.mark.parametrize("value", ["", "  \n", None, [], [user(" ")]])
def test_empty_prompts(value: Any) -> None:
    with pytest.raises(DataError, match=r"p\.jsonl, row 3: the prompt \(column 'prompt'\) is empty"):
        render({"prompt": value})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (12, "holds a number"),
        (["a", "b"], "holds a list"),
        ({"role": "user"}, "holds an object"),
        ([{"role": "user"}], "message 1 needs a role and a content"),
        ([user("a"), user([{"type": "video"}])], "message 2 needs a role and a content"),
        ([user("a"), user([{"type": "audio"}])], "the prompt has a sound, which nothing reads here"),
        ([user("a"), user([{"type": "image"}])], "the prompt has images, which nothing reads here"),
    ],
)
def test_prompts_of_a_wrong_type(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"p\.jsonl, row 3: .*{message}"):
        render({"prompt": value})


def test_text_parts_are_joined() -> None:
    prompt = render({"prompt": [user([{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}])]})
    assert "user\nthe cat<|im_end|>" in prompt.text


def test_conversations_need_a_chat_template_that_takes_them() -> None:
    with pytest.raises(DataError, match=r"row 3: .*no chat template; use an instruction-tuned model"):
        render({"prompt": [user("the cat")]}, tok=word_level())
    tok = byte_bpe()
    tok.chat_template = "{{ raise_exception('roles must alternate') }}" + CHATML
    with pytest.raises(DataError, match=r"row 3: .*chat template can't render.*roles must alternate"):
        render({"prompt": [user("the cat")]}, tok=tok)


def test_text_of_completions() -> None:
    assert text_of("a") == "a"
    assert text_of([{"role": "assistant", "content": "a"}]) == "a"
    with pytest.raises(DataError):
        text_of(3)
