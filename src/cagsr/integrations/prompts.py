"""Prompts as other loops hand them over, to tokens with the words that matter."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cagsr.config import DataConfig, SalienceConfig
from cagsr.errors import ConfigError, DataError
from cagsr.flow import EncodedPrompt, Prompt
from cagsr.prompts.encode import TextEncoder
from cagsr.prompts.render import render_prompt
from cagsr.prompts.rows import Row
from cagsr.prompts.salience import DocumentFrequency, salient_words, words_of_tokens

GivenPrompt = str | Sequence[Mapping[str, Any]]
"""A prompt as the loops hand it over: text, or a list of chat messages."""


@dataclass
class PromptEncoder:
    """Prompts as the loops hand them over, to tokens with the words that matter; each prompt is encoded once.

    Raises ConfigError where ``salience`` asks for spans, ModelError where the tokenizer has no offsets.
    """

    tokenizer: Any
    salience: SalienceConfig
    source: str
    """Where the prompts come from, for messages."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Handed to the chat template (``tools``, ``chat_template_kwargs``)."""
    frequency: DocumentFrequency | None = None
    _encoded: dict[str, EncodedPrompt] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.salience.weighting == "spans" or self.salience.markers is not None:
            raise ConfigError(
                "salience.weighting spans and salience.markers are not available inside other loops, which hand over prompts "
                "without spans: use idf or uniform."
            )
        self._texts = TextEncoder(self.tokenizer)

    @staticmethod
    def key(prompt: GivenPrompt) -> str:
        """A text that is equal for equal prompts."""
        return prompt if isinstance(prompt, str) else json.dumps([dict(one) for one in prompt], sort_keys=True)

    def render(self, prompt: GivenPrompt, row: int = 0) -> Prompt:
        """The prompt as the text that the model reads; raises DataError where it is empty or can't be rendered."""
        value = prompt if isinstance(prompt, str) else [dict(one) for one in prompt]
        data = DataConfig(path=self.source)
        rendered = render_prompt(
            Row(row, data.path, {**self.columns, "prompt": value}), data, self.salience, self.tokenizer
        )
        return replace(rendered, columns={})

    def fit(self, prompts: Iterable[GivenPrompt]) -> dict[str, Prompt]:
        """Count in how many prompts each word occurs (unless that was given) and encode them all, so that bad ones show at once.

        Returns the prompts by the text that the model reads; raises DataError for a bad prompt, by its number, or none at all.
        """
        keyed: dict[str, Prompt] = {}
        rendered = []
        for row, prompt in enumerate(prompts, start=1):
            key = self.key(prompt)
            if key not in keyed:
                keyed[key] = self.render(prompt, row)
            rendered.append(keyed[key])
        if not rendered:
            raise DataError(f"{self.source}: no prompt there; words can't be weighed.")
        self.frequency = self.frequency or DocumentFrequency.fit(rendered)
        self._encoded = {key: self.encode_rendered(prompt) for key, prompt in keyed.items()}
        return {prompt.text: prompt for prompt in rendered}

    def encode(self, prompt: GivenPrompt, row: int = 0) -> EncodedPrompt:
        """Tokens and salient words of a prompt; raises DataError, which names ``row``, where it can't be used."""
        key = self.key(prompt)
        if key not in self._encoded:
            self._encoded[key] = self.encode_rendered(self.render(prompt, row))
        return self._encoded[key]

    def encode_rendered(self, prompt: Prompt, *, add_special_tokens: bool | None = None) -> EncodedPrompt:
        """Tokens and salient words of what :meth:`render` gave; special tokens, as BOS, are added to plain prompts if None."""
        where = f"{self.source}, row {prompt.row}"
        special = prompt.messages is None if add_special_tokens is None else add_special_tokens
        tokens = self._texts.encode(prompt.text, add_special_tokens=special)
        # Without a count every word is as rare as any other.
        frequency = self.frequency or DocumentFrequency.fit([prompt])
        return words_of_tokens(
            prompt, tokens, salient_words(prompt, self.salience, frequency, where), self.salience, where
        )
