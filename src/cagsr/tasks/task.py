"""A task: what is said to the model after an answer of its own, or that the episode is over.

The default asks once. A task of your own needs no base class::

    class AskForMore:
        def reply(self, episode: Episode) -> str | None:
            return "Tell me more." if len(episode.answers) == 1 else None

Name it in ``rollout.task`` by its dotted path. What it says is read by the model, not paid and not trained on; its words become
part of what the next answer is judged by. A task that is quicker for many at once (a second model) has, beside ``reply``, a
method ``replies(episodes)`` that returns a list.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from cagsr.errors import CagsrError, ConfigError, RolloutError
from cagsr.flow import Episode
from cagsr.support.dotted_path import made_of_dotted


@runtime_checkable
class Task(Protocol):
    """Decides how an episode goes on."""

    def reply(self, episode: Episode) -> str | None:
        """What is said to the model next, as text: behind a plain prompt as it is, in a conversation as the user's message.

        It is asked after every answer that ended by itself (one that was cut at the length limit ends its episode), with the
        prompt and all that was said since. A text is not empty; None: the episode is over.
        """


def load_task(path: str | None) -> Task | None:
    """The task that a dotted path names: an object, or a class that needs no argument; None: one answer to each prompt.

    Raises ConfigError where it can't be imported, or is no task.
    """
    if path is None:
        return None
    task = made_of_dotted(path, "rollout.task")
    if not isinstance(task, Task):
        raise ConfigError(f"--rollout.task {path}: a task has a method reply(episode) that returns a text or None.")
    return task


def replies_of(task: Task, episodes: Sequence[Episode]) -> list[str | None]:
    """Ask a task of several episodes, at once if it can; RolloutError where it fails, or says something that is no text."""
    together = getattr(task, "replies", None)
    if together is None or not episodes:
        return [_checked(lambda one=episode: task.reply(one), episode) for episode in episodes]  # type: ignore[misc]
    said = _called(lambda: list(together(episodes)), "")
    if len(said) != len(episodes):
        raise RolloutError(f"the task gave {len(said)} replies to {len(episodes)} episodes; mend its replies")
    return [_checked(lambda one=text: one, episode) for text, episode in zip(said, episodes, strict=True)]  # type: ignore[misc]


def _checked(say: Callable[[], Any], episode: Episode) -> str | None:
    where = f" (row {episode.first.prompt.row}, turn {len(episode.answers)})"
    said = _called(say, where)
    if said is not None and (not isinstance(said, str) or not said):
        raise RolloutError(f"the task replied {said!r}{where}; return a text, or None to end the episode")
    return said


def _called(say: Callable[[], Any], where: str) -> Any:
    try:
        return say()
    except CagsrError:
        raise
    except Exception as error:  # a user's code can raise anything; the cause stays attached
        raise RolloutError(f"the task failed with {type(error).__name__}: {error}{where}; mend its reply") from error
