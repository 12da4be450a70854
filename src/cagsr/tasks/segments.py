"""What follows a prompt, as segments: tokens with the salient words that later answers are judged by.

The tokens of an answer are those that were sampled: what was said is never tokenised again, so that a position means the same
in sampling, scoring and the update.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cagsr.config import SalienceConfig
from cagsr.errors import DataError, RolloutError
from cagsr.flow import EncodedPrompt, Episode, Prompt, Segment, Spoken
from cagsr.models.continuation import encode_continuation
from cagsr.models.load import LoadedModel
from cagsr.models.stops import turn_end
from cagsr.prompts.answer_text import answered_messages
from cagsr.prompts.character_ranges import outside
from cagsr.prompts.chat import apply_template
from cagsr.prompts.encode import Tokens
from cagsr.prompts.salience import DocumentFrequency, salient_words, words_of_tokens

_HOLDER = "\ue000answer\ue001"
_THOUGHTS = re.compile(r"<(think|thinking|reasoning)>.*?</\1>\s*", re.DOTALL)


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
        written = text if messages is None else self._unended(episode) + self._in_template(episode, text)
        ids = encode_continuation(self.loaded.tokenizer, before if messages is None else "", written)
        segment = Segment(tuple(ids), text, "user", len(episode.answers), sampled=False)
        return self._weighed(segment)

    def _in_template(self, episode: Episode, text: str) -> str:
        """The text between an answer's stop token and the next answer.

        Templates that leave thoughts out of earlier turns (Qwen 3) write the past otherwise once it goes on. What was sampled
        stays as it is, so only what comes behind the answer is taken from them.
        """
        prompt, tokenizer = episode.first.prompt, self.loaded.tokenizer
        assert prompt.messages is not None
        spoken = [{"role": one.role, "content": one.text} for one in episode.segments]
        where = f"row {prompt.row}"

        def written(said: list[dict[str, str]], *, opened: bool) -> str:
            chat = answered_messages(prompt.messages or (), said)
            return apply_template(chat, tokenizer, prompt.columns, where, opened=opened)

        reply = {"role": "user", "content": text}
        until, whole = written(spoken, opened=False), written([*spoken, reply], opened=True)
        end = turn_end(tokenizer)
        marker = "" if end is None else end.marker
        if whole.startswith(until) and marker in until:
            return whole[until.rindex(marker) + len(marker) if marker else len(until) :]
        held = written([*spoken[:-1], {**spoken[-1], "content": _HOLDER}, reply], opened=True)
        _, found, behind = held.rpartition(_HOLDER)
        if not (marker and found and marker in behind and _spoken_only(whole).startswith(_spoken_only(until))):
            raise RolloutError(
                f"the chat template writes {where} otherwise once it goes on, so a second turn can't follow the tokens of the "
                "first; use a plain prompt, or a template that only appends"
            )
        return behind[behind.index(marker) + len(marker) :]

    def _unended(self, episode: Episode) -> str:
        """The end of turn that the last answer lacks, because a stop string ended it."""
        end = turn_end(self.loaded.tokenizer)
        if end is None or end.stop is None or episode.segments[-1].ids[-1:] == (end.stop,):
            return ""
        return end.gap + end.marker

    def _weighed(self, segment: Segment) -> Segment:
        """With its salient words; none where no word of it matters."""
        if self.salience.weighting == "spans":
            return segment
        text, offsets = self.loaded.spans(segment.ids)
        tokens = Tokens(
            ids=segment.ids,
            offsets=offsets,
            special=tuple(number in self.loaded.special_ids for number in segment.ids),
            blank=tuple(not text[start:end].strip() for start, end in offsets),
        )
        config = replace(self.salience, skip_sink=False)
        # What a chat template wrote around it is nobody's word.
        start = max(0, text.find(segment.text.strip()))
        said = (start, start + len(segment.text.strip())) if segment.text.strip() in text else (0, len(text))
        prompt = Prompt(
            row=0,
            text=text,
            template=outside(len(text), [said]),
            spoken=(Spoken(*said, segment.role, age=0),),
        )
        try:
            salient = salient_words(prompt, config, self.frequency, "")
            found: EncodedPrompt = words_of_tokens(prompt, tokens, salient, config, "")
        except DataError:  # nothing that later answers could look at
            return segment
        return replace(segment, words=found.words, salience=found.salience)


def _spoken_only(text: str) -> str:
    """A rendered conversation without the thoughts in it."""
    return _THOUGHTS.sub("", text)
