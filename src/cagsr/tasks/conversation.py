"""Conversations: the user's side is replayed from the data, or played by somebody who reads the conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cagsr.config import ConversationConfig
from cagsr.errors import RolloutError
from cagsr.flow import Episode
from cagsr.prompts.render import content_of
from cagsr.prompts.rows import USER_TURNS

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Replay:
    """What the user says next is what he said in the data, whatever he was answered."""

    turns: int
    """Answers of the model, at most."""

    def reply(self, episode: Episode) -> str | None:
        """The user's next message of the row."""
        said, answered = episode.first.prompt.columns.get(USER_TURNS) or (), len(episode.answers)
        if answered >= self.turns or answered > len(said):
            return None
        content = content_of(said[answered - 1])
        if content is None:
            raise RolloutError(
                f"row {episode.first.prompt.row}: what the user says in turn {answered + 1} is no text; mend it."
            )
        return content or None


class Speaker(Protocol):
    """Says what comes next in conversations, each given as chat messages of user and assistant in turn."""

    def __call__(self, conversations: Sequence[Messages]) -> Sequence[str]:
        """One message for each."""


@dataclass(frozen=True)
class PlayedUser:
    """A second model plays the user: it reads the conversation with the parts exchanged, and says what its user would."""

    speaker: Speaker
    config: ConversationConfig

    def reply(self, episode: Episode) -> str | None:
        """The user's next message."""
        return self.replies([episode])[0]

    def replies(self, episodes: Sequence[Episode]) -> list[str | None]:
        """Each user's next message; None where the conversation has had its turns, or the user ends it or says nothing."""
        said: list[str | None] = [None] * len(episodes)
        asked = [place for place, one in enumerate(episodes) if len(one.answers) < self.config.turns]
        if asked:
            heard = self.speaker([self._exchanged(episodes[place]) for place in asked])
            for place, text in zip(asked, heard, strict=True):
                ends = bool(self.config.end) and self.config.end in text
                said[place] = None if ends else text.strip() or None
        return said

    def _exchanged(self, episode: Episode) -> Messages:
        """The conversation as the one who plays the user sees it: it begins with what he is to do."""
        prompt = episode.first.prompt
        told = [*(prompt.messages or ({"role": "user", "content": prompt.text},))]
        told += [{"role": one.role, "content": one.text} for one in episode.segments]
        found: Messages = [{"role": "user", "content": self.config.instruction}]
        for message in told:
            # The assistant's instructions and its tools are not the user's to read.
            role = {"user": "assistant", "assistant": "user"}.get(str(message["role"]))
            content = str(message["content"] or "")
            if role is not None and found[-1]["role"] == role:  # templates want the parts to take turns
                found[-1]["content"] += "\n\n" + content
            elif role is not None:
                found.append({"role": role, "content": content})
        return found
