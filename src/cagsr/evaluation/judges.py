"""What judges finished answers, as it is asked for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Judges:
    """What judges the answers, besides the measures that need nothing; None: not measured."""

    checker: str | None = None
    """Dotted path of f(prompts, completions, **columns) -> a number for each answer, or a dict of named numbers."""
    judge_model: str | None = None
    """Decoder-only model for the follow-up perplexity."""
    embedding_model: str | None = None
    """sentence-transformers model for the relevance of an answer to its prompt."""
    reward_model: str | None = None
    """Reward model that no side was trained with."""
    follow_up_column: str | None = None
    """Column of the true follow-up; None: follow_up, else the first reference."""
