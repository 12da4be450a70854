"""What the quickstart's answers are worth: facts said less facts made up, which no reward of the runs knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cagsr.quickstart.task import facts_covered, read_prompt, wrong_facts


def net_facts(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Share of a prompt's facts that its answer says, less its wrong and invented facts as a share of the prompt's."""
    return [
        facts_covered(prompt, answer) - wrong_facts(prompt, answer) / len(read_prompt(prompt))
        for prompt, answer in zip(prompts, completions, strict=True)
    ]
