"""What TRL's reward functions ask of the trainer that calls them: its state, and places to log to."""

from collections.abc import Callable, Iterable
from typing import Any

from transformers import TrainerState

from cagsr.errors import RewardError

TRAINER_ARGUMENTS = frozenset({"trainer_state", "log_metric", "log_extra"})


class TrainerCalls:
    """The trainer as a reward function sees it, for a run or for one call; ``state.global_step`` counts finished steps, as
    in TRL.
    """

    def __init__(self, state: TrainerState) -> None:
        self.state = state
        self.metrics: dict[str, list[float]] = {}
        """What was logged with ``log_metric`` since the last :meth:`begin`."""
        self.extra: dict[str, list[Any]] = {}
        """What was logged with ``log_extra``: column -> a value for each answer."""
        self._owners: dict[str, str] = {}

    def arguments(self, function: str, answers: int) -> dict[str, Any]:
        """``TRAINER_ARGUMENTS`` for one call of a reward function (its name, for messages) that judges so many answers.

        What they raise is a RewardError: a value that is no number, a column with another number of values than there are
        answers, or one that was logged before.
        """
        given: set[str] = set()

        def log_metric(name: str, value: float) -> None:
            try:
                self.metrics.setdefault(str(name), []).append(float(value))
            except (TypeError, ValueError) as error:
                raise RewardError(
                    f"reward function {function!r} called log_metric({name!r}, {value!r}): give a number"
                ) from error

        def log_extra(column: str, values: Iterable[Any]) -> None:
            listed = [_plain(value) for value in values]
            if len(listed) != answers:
                raise RewardError(
                    f"reward function {function!r} called log_extra({column!r}) with {len(listed)} values for {answers} "
                    "answers: give one for each"
                )
            owner = self._owners.setdefault(column, function)
            if owner != function or column in given:
                raise RewardError(
                    f"reward function {function!r} called log_extra({column!r}), a column that "
                    f"{'it' if owner == function else repr(owner)} has logged already: give it a name of its own"
                )
            given.add(column)
            self.extra.setdefault(column, []).extend(listed)

        return {"trainer_state": self.state, "log_metric": log_metric, "log_extra": log_extra}

    def averages(self, gather: Callable[[list[Any]], list[Any]], taken: Iterable[str]) -> dict[str, float]:
        """The mean of everything that was logged under each name, over all processes, which all call this.

        ``gather`` collects the items of all processes' lists. RewardError for a name in ``taken``, the trainer's own metrics.
        """
        everything: dict[str, list[float]] = {}
        for name, values in gather(list(self.metrics.items())):
            everything.setdefault(name, []).extend(values)
        for name in sorted(everything.keys() & {*taken, "step"}):
            raise RewardError(f"a reward function called log_metric({name!r}), which is a metric of ours: rename it")
        return {name: sum(values) / len(values) for name, values in sorted(everything.items())}

    def begin(self, steps_done: int, epoch: float | None) -> None:
        """Open the next step: nothing is logged of it yet."""
        self.state.global_step, self.state.epoch = steps_done, epoch
        self.metrics, self.extra, self._owners = {}, {}, {}


def no_trainer() -> TrainerCalls:
    """What a function sees where nothing is trained: the end of a training, and places to log to that nobody reads."""
    return TrainerCalls(TrainerState(global_step=1, max_steps=1, num_train_epochs=1, epoch=1.0))


def _plain(value: Any) -> Any:
    """A value as JSON can hold it (tensors and NumPy's numbers are turned by whoever writes them), else its text."""
    simple = value is None or isinstance(value, str | int | float) or hasattr(value, "tolist")
    return value if simple else str(value)
