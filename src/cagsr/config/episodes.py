"""Settings of how episodes are made, and of which prompts: conversations, steps, reference answers, curricula."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cagsr.config.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, ShareBelowOne


@dataclass(frozen=True)
class ConversationConfig:
    """Conversations: who speaks after an answer of the model's (docs/conversations.md)."""

    user: str | None = None
    """replay: the data, what its user says next (rows of messages or turns, or a column user_turns); the folder or Hub id of a
    chat model, or the address of an OpenAI-compatible server (http://HOST:PORT/v1), which plays the user; None: nobody."""
    turns: PositiveInt = 3
    """Answers of the model in a conversation, at most; replay: the data may have fewer."""
    instruction: str = (
        "You play the user of an assistant. Write the user's next message, nothing else: ask for what is still open, and "
        "stay with your subject. When nothing is open, write [END]."
    )
    """Who plays the user reads this first."""
    end: str = "[END]"
    """A message that holds this text ends the conversation, and is not said."""
    max_new_tokens: PositiveInt = 64
    """Longest message of a played user, in tokens."""
    temperature: NonNegativeFloat = 1.0
    """A played user's sampling temperature; 0 takes the likeliest tokens."""
    model_name: str = "default"
    """Which model of the server plays the user."""
    timeout: PositiveFloat = 120.0
    """Seconds to wait for each of the server's messages. Its key, if it wants one, is read from CAGSR_USER_API_KEY."""

    @property
    def server(self) -> str | None:
        """The server's address, where one plays the user."""
        return self.user if self.user is not None and self.user.startswith(("http://", "https://")) else None


@dataclass(frozen=True)
class CurriculumConfig:
    """Which prompts come next (docs/supervision.md)."""

    kind: Literal["none", "skip_flat", "self_paced"] = "none"
    """none: shuffled epochs; skip_flat: a prompt whose answers were all worth the same is left out of the next epoch;
    self_paced: a bandit over clusters of prompts, most from where answers differ most."""
    clusters: PositiveInt = 8
    """self_paced: clusters, by meaning and by how much there is to say."""
    embedding_model: str | None = None
    """self_paced: sentence-transformers model for the meaning (pip install cagsr[embeddings]); None: the words, by TF-IDF."""
    exploration: NonNegativeFloat = 0.5
    """self_paced: how much an arm that was drawn seldom gains on the others."""
    memory: ShareBelowOne = 0.7
    """self_paced: share of an arm's value that each new one leaves of it."""


@dataclass(frozen=True)
class SupervisionConfig:
    """Supervision in the same stage: rows that have a reference answer (docs/supervision.md)."""

    mode: Literal["none", "visurf", "s3ft"] = "none"
    """visurf: one of the answers to each prompt is the row's reference, reinforced among the sampled ones. s3ft: nothing is
    reinforced; the model's own best answer is imitated where the reward accepts it, else the reference."""
    reward: Literal["own", "best", "smooth"] = "smooth"
    """What a reference is paid. own: what the reward says; best: at least as much as the best sampled answer; smooth: the same,
    but the mean of the sampled ones where one of them is worth as much already."""
    margin: NonNegativeFloat = 0.0
    """s3ft: how much less than the reference an own answer may be worth to be accepted."""


@dataclass(frozen=True)
class StepsConfig:
    """Chains of thought: the steps of an answer, each judged by the question and the steps before it (docs/reasoning.md)."""

    by: Literal["none", "lines", "paragraphs", "sentences", "delimiter", "function"] = "none"
    """Where a step ends; none: an answer is one piece. function: a function of your own says it."""
    delimiter: str | None = None
    """delimiter: the text between two steps."""
    function: str | None = None
    """function: dotted path of f(text) -> texts, the steps, which one behind the other are the answer."""
    tag: str | None = None
    """A tag around the reasoning, as think for <think>...</think>: what follows it is the answer, one step."""
    most: PositiveInt = 16
    """Steps of an answer, at most; what follows is part of the last one."""

    def conflicts(self) -> Iterator[str]:
        """Yield what does not go together, a sentence each."""
        for way, given in (("delimiter", self.delimiter), ("function", self.function)):
            if self.by == way and not given:
                yield f"--steps.by {way}: give --steps.{way}."
            if self.by != way and given:
                yield f"--steps.{way}: it counts with --steps.by {way} alone."
        if self.by in ("none", "function") and self.tag is not None:
            yield f"--steps.tag: with --steps.by {self.by} nothing looks for it."
        if self.by == "none" and self.most != StepsConfig.most:
            yield "--steps.most: it counts with --steps.by alone."
