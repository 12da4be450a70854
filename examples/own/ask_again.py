"""A task of two turns: after the first answer the model is asked for what it left out.

    cagsr train ... --rollout.task examples.own.ask_again.AskAgain

The question is read, not paid and not trained on; its words and those of the first answer become part of what the second
answer is judged by.
"""

from __future__ import annotations

from cagsr.flow import Episode


class AskAgain:
    """Name the prompt's words that the first answer did not say."""

    def reply(self, episode: Episode) -> str | None:
        """The question after the first answer, None after the second or where nothing is missing."""
        if len(episode.answers) > 1:
            return None
        said = set(episode.answers[0].split())
        missing = [word for word in dict.fromkeys(episode.first.prompt.text.split()) if word not in said]
        return f" and {' '.join(missing[:4])} ?" if missing else None
