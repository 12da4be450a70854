"""What a user should know about the prompts before a run, in sentences."""

from __future__ import annotations

from typing import Any

from cagsr.config import DataConfig, SalienceConfig
from cagsr.flow import Prompt
from cagsr.prompts.salience import DocumentFrequency


def describe(
    data: DataConfig, salience: SalienceConfig, tokenizer: Any, example: Prompt, frequency: DocumentFrequency
) -> list[str]:
    """Sentences about the salience and about settings that have no effect on these prompts.

    ``example`` is one prompt of the set: whether it is a conversation decides what is said.
    """
    notes = []
    if salience.weighting == "idf":
        notes.append(_about_idf(salience, frequency))
    elif salience.weighting == "uniform":
        notes.append("Every word of a prompt counts alike (--salience.weighting uniform).")
    else:
        notes.append("Only marked words count (--salience.weighting spans).")
    if salience.weighting != "spans" and (salience.markers is not None or data.spans_column is not None):
        notes.append(f"Marked passages are read but not used: --salience.weighting is {salience.weighting}, not spans.")
    if example.messages is None:
        if getattr(tokenizer, "chat_template", None) is not None:
            notes.append(
                "The prompts are plain text, so the tokenizer's chat template is not applied; give prompts as lists of "
                "chat messages to apply it."
            )
        if data.system_prompt is not None:
            notes.append("--data.system_prompt has no effect: the prompts are plain text, not conversations.")
    return notes


def _about_idf(salience: SalienceConfig, frequency: DocumentFrequency) -> str:
    if len(set(frequency.counts.values())) == 1 and frequency.documents in frequency.counts.values():
        return "Every word occurs in every prompt, so IDF weighs all words alike."
    dropped = frequency.boilerplate(salience.idf_floor)
    if not dropped:
        return "Words count by their IDF over the prompts; none is so common that it drops out."
    shown = ", ".join(dropped[:8]) + (", ..." if len(dropped) > 8 else "")
    return (
        f"Words count by their IDF over the prompts; {len(dropped)} common "
        f"{'word weighs' if len(dropped) == 1 else 'words weigh'} nothing: {shown} "
        f"(--salience.idf_floor {salience.idf_floor:g})."
    )
