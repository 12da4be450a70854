"""What a user should know about the prompts before a run, in sentences."""

from collections.abc import Sequence
from typing import Any

from cagsr.config import DataConfig, SalienceConfig
from cagsr.flow import Prompt
from cagsr.models.stops import turn_end
from cagsr.prompts.chat import is_rendered
from cagsr.prompts.salience import DocumentFrequency


def describe(
    data: DataConfig,
    salience: SalienceConfig,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    frequency: DocumentFrequency,
) -> list[str]:
    """Sentences about what the prompts are, about the salience and about settings that have no effect on them.

    Whether the first of ``prompts`` is a conversation decides what is said of the settings.
    """
    notes = about_form(prompts, tokenizer)
    example = prompts[0]
    if salience.weighting == "idf":
        notes.append(_about_idf(salience, frequency))
    elif salience.weighting == "uniform":
        notes.append("Every word of a prompt counts alike (--salience.weighting uniform).")
    else:
        notes.append("Only marked words count (--salience.weighting spans).")
    if salience.weighting != "spans" and (salience.markers is not None or data.spans_column is not None):
        notes.append(f"Marked passages are read but not used: --salience.weighting is {salience.weighting}, not spans.")
    if example.messages is None:
        if getattr(tokenizer, "chat_template", None) is not None and not is_rendered(example.text, tokenizer):
            notes.append(
                "The prompts are plain text, so the tokenizer's chat template is not applied; give prompts as lists of "
                "chat messages to apply it."
            )
        if data.system_prompt is not None:
            notes.append("--data.system_prompt has no effect: the prompts are plain text, not conversations.")
    elif (end := turn_end(tokenizer)) is None or end.stop is None:
        follows = end.before_next if end is not None else ""
        named = f" (the template goes on with {follows.rstrip()!r})" if follows.strip() else ""
        notes.append(
            "Careful: the chat template writes no token that ends an answer, so answers may never stop; name what comes "
            f"behind them with --sampling.stop_strings{named}."
        )
    return notes


def about_form(prompts: Sequence[Prompt], tokenizer: Any) -> list[str]:
    """Sentences about prompts that are not what they seem: rendered before they were written, or begun answers."""
    notes = []
    rendered = sum(prompt.messages is None and is_rendered(prompt.text, tokenizer) for prompt in prompts)
    if rendered:
        notes.append(
            f"{_of(rendered, prompts)} hold a chat template's marks (or the BOS token) as text: the marks are no words that "
            "matter, and no second BOS is put before them; to have the template applied give lists of chat messages."
        )
    begun = sum(prompt.messages is not None and prompt.messages[-1]["role"] == "assistant" for prompt in prompts)
    if begun:
        notes.append(
            f"{_of(begun, prompts)} end with a message of the assistant: answers go on from its text (a prefill). To read that "
            "message as the answer, name the column 'messages' and leave --data.prompt_column out."
        )
    return notes


def about_messages(data: DataConfig) -> str:
    """Say how rows of OpenAI's form were read."""
    if data.messages == "first_turn":
        return (
            f"The rows of {data.path} are conversations: the user's first message is the prompt, what he says later is for "
            "--conversation.user replay."
        )
    return (
        f"The rows of {data.path} have 'messages' and no prompt: the assistant's last turn is the completion, what comes before "
        "it the prompt."
    )


def _of(count: int, prompts: Sequence[Prompt]) -> str:
    return f"All {count:,} prompts" if count == len(prompts) else f"{count:,} of {len(prompts):,} prompts"


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
