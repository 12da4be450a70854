"""What stands before an answer of an episode, as a prompt of its own."""

from dataclasses import replace

from cagsr.flow import Episode, Prompt
from cagsr.prompts.rows import ANSWERS


def prompt_before(prompt: Prompt, episode: Episode, turn: int) -> Prompt:
    """The prompt as it stands before the answer of ``turn``: what was said since is part of it.

    Of a conversation from the data (``answers_by_turn``) the column ``reference`` is what the user was answered there.
    """
    answers = prompt.columns.get(ANSWERS) or ()
    if turn < len(answers):
        prompt = replace(prompt, columns={**prompt.columns, "reference": answers[turn]})
    said = [segment for segment in episode.segments if segment.turn < turn or not segment.sampled]
    before = [segment for segment in said if segment.turn <= turn]
    if not before:
        return prompt
    messages = prompt.messages
    if messages is not None:
        messages = (*messages, *({"role": one.role, "content": one.text} for one in before))
    return replace(prompt, text=prompt.text + "".join(segment.text for segment in before), messages=messages)
