"""Where turns begin and end under the chat templates people use, token by token against the templates' own markers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from cagsr.config import SalienceConfig
from cagsr.errors import RolloutError
from cagsr.flow import Episode
from cagsr.models.load import LoadedModel
from cagsr.prompts.prepare import encode_texts
from cagsr.prompts.salience import DocumentFrequency
from cagsr.tasks.segments import SegmentEncoder
from prompts_tokenizers import byte_bpe

QWEN_2_5 = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
            or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
QWEN_3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
LLAMA_3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token}}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Family:
    """A template, the special tokens that it writes, the one that ends an answer, and what an answer begins with."""

    template: str
    special: tuple[str, ...]
    stop: str
    lead: str = ""
    opening: str = ""
    """What opens an answer."""


FAMILIES = {
    "qwen2.5": Family(QWEN_2_5, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", opening="<|im_start|>assistant\n"),
    "qwen3": Family(QWEN_3, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", opening="<|im_start|>assistant\n"),
    "llama3": Family(
        LLAMA_3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>",
        opening="<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "gemma": Family(GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", opening="<start_of_turn>model\n"),
    "mistral": Family(MISTRAL, ("[INST]", "[/INST]"), "</s>", lead=" ", opening=" [/INST]"),
}  # fmt: skip
SAID = ("which cats do you have?", "any black ones?", "good.")
ANSWERS = ("two: one red, one black.", "yes, Kit.")
THOUGHT = "<think>\nthere is Kit\n</think>\n\n"


class OnlyTokenizer:
    """As much of a loaded model as segments are made with."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def text_of(self, ids: Any) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    spans: Any = LoadedModel.spans
    special_ids: Any = LoadedModel.special_ids


def model_of(family: Family) -> OnlyTokenizer:
    tokenizer = byte_bpe(chat=False)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.special)})
    tokenizer.chat_template = family.template
    return OnlyTokenizer(tokenizer)


def conversation(model: OnlyTokenizer, family: Family, answers: tuple[str, ...]) -> Episode:
    """The prompt, the answers as they would have been sampled, and the replies."""
    salience = SalienceConfig(weighting="uniform")
    encoder = SegmentEncoder(model, salience, DocumentFrequency(1, {}))  # type: ignore[arg-type]
    (prompt,) = encode_texts([[{"role": "user", "content": SAID[0]}]], model.tokenizer, salience, 500)
    episode = Episode(prompt, (), True)
    for turn, (answer, said) in enumerate(zip(answers, SAID[1:], strict=True)):
        ids = model.tokenizer(family.lead + answer + family.stop, add_special_tokens=False)["input_ids"]
        spoken = encoder.answer(ids, family.lead + answer, turn)
        episode = Episode(prompt, (*episode.segments, spoken), True)
        episode = Episode(prompt, (*episode.segments, encoder.reply(episode, said)), True)
    return episode


def tokens_of(episode: Episode) -> list[int]:
    return [*episode.first.ids, *(number for segment in episode.segments for number in segment.ids)]


def written(model: OnlyTokenizer, answers: tuple[str, ...]) -> str:
    chat = [{"role": "user", "content": SAID[0]}]
    for answer, said in zip(answers, SAID[1:], strict=True):
        chat += [{"role": "assistant", "content": answer}, {"role": "user", "content": said}]
    return str(model.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_turns_are_the_template_s_own_token_by_token(name: str):
    family = FAMILIES[name]
    model = model_of(family)
    episode = conversation(model, family, ANSWERS)
    whole = written(model, ANSWERS)
    assert model.tokenizer.decode(tokens_of(episode)) == whole
    # The markers are tokens of their own, so both ways of encoding agree: at once, and piece by piece.
    expected = model.tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert tokens_of(episode) == expected
    stop = model.tokenizer.convert_tokens_to_ids(family.stop)
    said, replied = episode.segments[::2], episode.segments[1::2]
    assert [segment.sampled for segment in episode.segments] == [True, False, True, False]
    for turn, (segment, answer) in enumerate(zip(said, ANSWERS, strict=True)):
        # What was sampled is the answer and the token that ends it, nothing of what the template writes behind it.
        assert segment.turn == turn
        assert segment.ids[-1] == stop
        assert stop not in segment.ids[:-1]
        assert model.text_of(segment.ids).strip() == answer
    for turn, (segment, text) in enumerate(zip(replied, SAID[1:], strict=True), 1):
        assert segment.turn == turn
        shown = model.tokenizer.decode(segment.ids)
        assert text in shown
        assert shown.endswith(family.opening)  # and there the next answer begins
        words = model.text_of([one for one, word in zip(segment.ids, segment.words, strict=True) if word >= 0])
        assert "".join(words.split()) == "".join(filter(lambda one: one.isalnum(), text))
    assert model.tokenizer.decode(episode.first.ids).endswith(family.opening)


def test_thoughts_that_a_template_drops_later_stay_as_they_were_sampled():
    """Qwen 3 leaves thoughts out of earlier turns: the tokens that were said are kept, and go on with what follows them."""
    family = FAMILIES["qwen3"]
    model = model_of(family)
    said = (THOUGHT + ANSWERS[0], THOUGHT + ANSWERS[1])
    episode = conversation(model, family, said)
    dropped = written(model, said)
    assert "think" not in dropped
    kept = dropped
    for answer in ANSWERS:
        kept = kept.replace(answer, THOUGHT + answer)
    assert model.tokenizer.decode(tokens_of(episode)) == kept
    assert tokens_of(episode) == model.tokenizer(kept, add_special_tokens=False)["input_ids"]


def test_a_template_that_changes_what_was_said_is_refused():
    family = FAMILIES["qwen2.5"]
    counting = Family("{{ messages | length }} " + QWEN_2_5, family.special, family.stop)
    with pytest.raises(RolloutError, match="writes row 1 otherwise once it goes on"):
        conversation(model_of(counting), counting, ANSWERS)
