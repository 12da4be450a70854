"""What an objective, perhaps a user's own, says of a micro-batch: its loss, and what is logged of it."""

from torch import Tensor

from cagsr.errors import CagsrError
from cagsr.objectives.objective import Objective, ObjectiveLoss, UpdateBatch
from cagsr.objectives.policy import PolicyObjective


def loss_of(objective: Objective, batch: UpdateBatch) -> ObjectiveLoss:
    """The loss of a micro-batch; a user's code can raise anything, which is told in a sentence."""
    try:
        found = objective(batch)
    except CagsrError:
        raise
    except Exception as error:  # a user's code can raise anything; the cause stays attached
        raise CagsrError(
            f"The objective {objective.name!r} failed with {type(error).__name__}: {error}; mend it."
        ) from error
    if not isinstance(found, ObjectiveLoss):
        raise CagsrError(f"The objective {objective.name!r} returned {type(found).__name__}; return an ObjectiveLoss.")
    return found


def logged_of(objective: Objective, found: ObjectiveLoss) -> dict[str, Tensor]:
    """What an objective wants logged: the policy's under TRL's names, the others' under their own."""
    own = isinstance(objective, PolicyObjective)
    return {name if own else f"{objective.name}/{name}": value.detach() for name, value in found.metrics.items()}
