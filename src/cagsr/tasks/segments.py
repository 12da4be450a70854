"""What follows a prompt, as segments: tokens with the salient words that later answers are judged by.

The tokens of an answer are those that were sampled: what was said is never tokenised again, so that a position means the same
in sampling, scoring and the update.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from cagsr.config import SalienceConfig
from cagsr.errors import DataError, RolloutError
from cagsr.flow import EncodedPrompt, Episode, Prompt, Segment
from cagsr.models.continuation import encode_continuation
from cagsr.models.load import LoadedModel
from cagsr.models.stops import turn_end
from cagsr.prompts.answer_text import answered_messages
from cagsr.prompts.chat import apply_template
from cagsr.prompts.encode import Tokens
from cagsr.prompts.salience import DocumentFrequency, salient_words, words_of_tokens


@dataclass(frozen=True)
class SegmentEncoder:
    """Turns answers and replies into segments, by the policy's tokenizer and chat template.

    ``salience`` says which words matter (``spans`` marks none of what is said later), ``frequency`` how rare they are, as in the
    prompts.
    """

    loaded: LoadedModel
    salience: SalienceConfig
    frequency: DocumentFrequency

    def answer(self, ids: Sequence[int], text: str, turn: int) -> Segment:
        """What the model said, its stop token included."""
        return self._weighed(Segment(tuple(ids), text, "assistant", turn, sampled=True))

    def reply(self, episode: Episode, text: str) -> Segment:
        """What a task says after the last answer of an episode, with what a chat template writes around it.

        Raises RolloutError where the chat template doesn't go on from the answer.
        """
        messages = episode.first.prompt.messages
        before = episode.first.prompt.text + "".join(one.text for one in episode.segments)
        written = text if messages is None else self._in_template(episode, text)
        ids = encode_continuation(self.loaded.tokenizer, before if messages is None else "", written)
        segment = Segment(tuple(ids), text, "user", len(episode.answers), sampled=False)
        return self._weighed(segment)

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self.loaded.tokenizer.added_tokens_decoder
        named = {number for number, token in added.items() if token.special}
        return frozenset(self.loaded.tokenizer.all_special_ids) | named

    def _in_template(self, episode: Episode, text: str) -> str:
        """The text between an answer's stop token and the next answer."""
        prompt, tokenizer = episode.first.prompt, self.loaded.tokenizer
        assert prompt.messages is not None
        spoken = [{"role": one.role, "content": one.text} for one in episode.segments]
        chat = answered_messages(prompt.messages, spoken)
        where = f"row {prompt.row}"
        until = apply_template(chat, tokenizer, prompt.columns, where, opened=False)
        whole = apply_template(
            [*chat, {"role": "user", "content": text}], tokenizer, prompt.columns, where, opened=True
        )
        end = turn_end(tokenizer)
        marker = "" if end is None else end.marker
        if not whole.startswith(until) or (marker and marker not in until):
            raise RolloutError(
                f"the chat template writes {where} otherwise once it goes on, so a second turn can't follow the tokens of the "
                "first; use a plain prompt, or a template that only appends"
            )
        ended = len(until) if not marker else until.rindex(marker) + len(marker)
        return whole[ended:]

    def _weighed(self, segment: Segment) -> Segment:
        """With its salient words; none where no word of it matters."""
        if self.salience.weighting == "spans":
            return segment
        text, offsets = self._spans(segment.ids)
        tokens = Tokens(
            ids=segment.ids,
            offsets=offsets,
            special=tuple(number in self._special for number in segment.ids),
            blank=tuple(not text[start:end].strip() for start, end in offsets),
        )
        prompt, config = Prompt(row=0, text=text), replace(self.salience, skip_sink=False)
        try:
            salient = salient_words(prompt, config, self.frequency, "")
            found: EncodedPrompt = words_of_tokens(prompt, tokens, salient, config, "")
        except DataError:  # nothing that later answers could look at
            return segment
        return replace(segment, words=found.words, salience=found.salience)

    def _spans(self, ids: Sequence[int]) -> tuple[str, tuple[tuple[int, int], ...]]:
        """The text of some tokens, and where each lies in it; special tokens take no room."""
        plain = [number for number in ids if number not in self._special]
        ends = iter([len(self.loaded.text_of(plain[: count + 1])) for count in range(len(plain))])
        text, offsets, last = self.loaded.text_of(plain), [], 0
        for number in ids:
            end = last if number in self._special else max(last, next(ends))
            offsets.append((last, end))
            last = end
        return text, tuple(offsets)
