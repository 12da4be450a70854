"""In which order prompts are met: the interface, whose default is shuffled epochs (:class:`~cagsr.prompts.stream.PromptStream`)."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from cagsr.flow import EncodedPrompt, Returns


class Curriculum(Protocol):
    """Deals prompts to one process, and may learn from how its answers did. Its state goes into checkpoints as JSON."""

    @property
    def epoch(self) -> float:
        """Epochs gone through."""

    def next(self) -> list[EncodedPrompt]:
        """Deal this process's prompts of the next step."""

    def observe(self, prompts: Sequence[EncodedPrompt], returns: Returns) -> None:
        """What the answers to the last prompts were paid: ``returns`` has the rows of each prompt behind each other."""

    def state_dict(self) -> dict[str, Any]:
        """Where it stands."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where ``state`` stood."""
