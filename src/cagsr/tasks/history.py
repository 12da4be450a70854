"""What stands before an answer of an episode, as a prompt of its own."""

from dataclasses import replace

from cagsr.flow import Episode, Prompt
from cagsr.prompts.references import REFERENCE_COLUMNS
from cagsr.prompts.rows import ANSWERS, USER_TURNS


def prompt_before(prompt: Prompt, episode: Episode, turn: int) -> Prompt:
    """The prompt as it stands before the answer of ``turn``: what was said since is part of it.

    A row's references are of its first turn. Of a later one the column ``reference`` is what the data's user was answered there
    (``answers_by_turn``), if he said the same until then; else there is none.
    """
    said = [segment for segment in episode.segments if segment.turn < turn or not segment.sampled]
    before = [segment for segment in said if segment.turn <= turn]
    answers = prompt.columns.get(ANSWERS) or ()
    if not before:
        return prompt
    columns = {name: value for name, value in prompt.columns.items() if name not in REFERENCE_COLUMNS}
    asked = [segment.text for segment in before if not segment.sampled]
    replayed = list(prompt.columns.get(USER_TURNS) or ())[: len(asked)]
    if turn < len(answers) and replayed == asked and len(asked) == turn:
        columns["reference"] = answers[turn]
    messages = prompt.messages
    if messages is not None:
        messages = (*messages, *({"role": one.role, "content": one.text} for one in before))
    text = prompt.text + "".join(segment.text for segment in before)
    return replace(prompt, text=text, messages=messages, columns=columns)
