"""What ends an answer: the model's end tokens, what the chat template writes behind an answer, and stop strings.

A chat template often ends a turn with another token than the tokenizer's EOS (``<|im_end|>`` beside ``<|endoftext|>``),
and not every generation config names it. A model trained on such conversations says that token when it is done; a
generation that doesn't know it goes on to the length limit. So the token is read off the template.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import GenerationConfig

from cagsr.errors import ConfigError

TEMPLATE_ERRORS = (TemplateError, ValueError, TypeError, LookupError, AttributeError)
"""What a template that does not like a conversation raises: it is a program."""

_ANSWER, _QUESTION, _NEXT = "\ue000answer\ue001", "\ue000question\ue001", "\ue000next\ue001"
"""Contents to find again: no template looks for private-use characters, no strip() removes them."""

HARDLY_ANY = 0.1
"""Share of answers below which it is worth saying that they don't end by themselves."""


@dataclass(frozen=True)
class TurnEnd:
    """How a chat template surrounds an answer."""

    lead: str
    """White space between the text that asks for the answer and the answer (a space in Llama 2's)."""
    gap: str
    """What stands between the answer and the token that ends it."""
    stop: int | None
    """The token that ends it; None: the template writes no token there."""
    marker: str
    """Its text."""
    behind_last: str
    """What the template writes behind the last answer of a conversation."""
    before_next: str
    """What it writes between an answer and what the user says next."""

    def cut(self, text: str) -> str:
        """A conversation's end as a rollout would leave it: nothing behind the token that ends the answer."""
        if self.stop is None:
            return text
        if self.marker not in self.behind_last:
            # Written only before what follows (GLM): an answer that is the last one ends with it all the same.
            return text + self.marker
        if not text.endswith(self.behind_last):
            return text
        return text.removesuffix(self.behind_last) + self.gap + self.marker


def turn_end(tokenizer: Any) -> TurnEnd | None:
    """Read off a tokenizer's chat template how answers end; None without one, or where none renders a question and an answer."""
    template = getattr(tokenizer, "chat_template", None)
    return None if template is None else _turn_end(tokenizer, str(template))


def stop_tokens(generation: GenerationConfig | None, tokenizer: Any) -> tuple[int, ...]:
    """Token ids that end an answer: those of the generation config, the tokenizer's EOS, the chat template's.

    The template's counts for plain prompts too: no text holds it, so a model says it there only when it means that the
    answer is over, and the trained and the served model stop alike whatever they are asked.
    """
    declared = None if generation is None else generation.eos_token_id
    ids = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    end = turn_end(tokenizer)
    ids += [number for number in (tokenizer.eos_token_id, None if end is None else end.stop) if number is not None]
    return tuple(dict.fromkeys(int(number) for number in ids))


def split_stop_strings(tokenizer: Any, strings: Sequence[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Stop strings that are one special token, as ids, and the others, which are looked for in an answer's text.

    Special tokens are left out of an answer's text, so a string with one among other text would never be found: ConfigError.
    """
    if not strings:
        return (), ()
    special = {text: number for number, text in _special(tokenizer).items()}
    texts = tuple(text for text in strings if text not in special)
    for text in texts:
        if held := next((token for token in special if token in text), None):
            raise ConfigError(
                f"--sampling.stop_strings {text!r}: holds the special token {held!r} among other text, which no text of an "
                f"answer shows; give {held!r} alone, and answers end at it."
            )
    return tuple(special[text] for text in strings if text in special), texts


def hardly_any_end(share: float, max_new_tokens: int | None = None) -> str:
    """A sentence about answers of which only ``share`` end by themselves, and what to do."""
    longest = "" if max_new_tokens is None else f" ({max_new_tokens} tokens)"
    return (
        f"{share:.0%} of the answers end by themselves, the others are cut at --sampling.max_new_tokens{longest}: raise "
        "it if they are cut short; if they run on when they are done, name what the model says there with "
        "--sampling.stop_strings, or teach it to end (cagsr sft)."
    )


def endless(ended: Sequence[bool], max_new_tokens: int) -> list[str]:
    """That sentence, if hardly any of these answers ended by themselves."""
    share = sum(ended) / max(1, len(ended))
    return [f"Careful: {hardly_any_end(share, max_new_tokens)}"] if share < HARDLY_ANY else []


@lru_cache(maxsize=16)
def _turn_end(tokenizer: Any, template: str) -> TurnEnd | None:
    asked = [{"role": "user", "content": _QUESTION}]
    answered = [*asked, {"role": "assistant", "content": _ANSWER}]
    for opening in ([], [{"role": "system", "content": "."}]):
        whole = _rendered(tokenizer, [*opening, *answered])
        if whole is not None and _ANSWER in whole:
            break
    else:
        return None
    prompt = _rendered(tokenizer, [*opening, *asked], add_generation_prompt=True)
    before, _, last = whole.rpartition(_ANSWER)
    lead = before[len(prompt) :] if prompt is not None and before.startswith(prompt) else ""
    following = _rendered(tokenizer, [*opening, *answered, {"role": "user", "content": _NEXT}])
    between = "" if following is None else following.rpartition(_ANSWER)[2].partition(_NEXT)[0]
    stop, marker = _first_marker(tokenizer, last)
    gap = last.partition(marker)[0] if marker else ""
    if stop is None:
        stop, marker = _first_marker(tokenizer, between)
    return TurnEnd("" if lead.strip() else lead, gap, stop, marker, last, between)


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, str]], **arguments: bool) -> str | None:
    try:
        return str(tokenizer.apply_chat_template([dict(one) for one in messages], tokenize=False, **arguments))
    except TEMPLATE_ERRORS:
        return None


def _first_marker(tokenizer: Any, text: str) -> tuple[int | None, str]:
    """The first special token that ``text`` writes out, and its text."""
    markers = _markers(tokenizer)
    for number in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]:
        # An unknown token is special too, but stands for a text that is not its own.
        if number in markers and markers[number] in text:
            return int(number), markers[number]
    return None, ""


def _markers(tokenizer: Any) -> dict[int, str]:
    """Tokens that stand for themselves: special ones, and added ones with a name.

    Some tokenizers add their chat markers as ordinary tokens; they also add runs of spaces, which are text.
    """
    named = {
        int(number): str(text)
        for text, number in tokenizer.get_added_vocab().items()
        if str(text).replace("▁", " ").strip()
    }
    return named | _special(tokenizer)


def _special(tokenizer: Any) -> dict[int, str]:
    """Tokens that are left out when an answer is decoded."""
    added = {int(n): str(token.content) for n, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return added | {int(number): str(text) for number, text in named}
