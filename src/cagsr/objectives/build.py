"""The list of objectives that the settings ask for."""

from cagsr.advantage.kl import KLController
from cagsr.config import PPOConfig
from cagsr.errors import ConfigError
from cagsr.objectives.objective import Objective
from cagsr.objectives.policy import PolicyObjective
from cagsr.objectives.token_means import CrossEntropyObjective, EntropyObjective, KLObjective
from cagsr.objectives.value import ValueObjective
from cagsr.support.dotted_path import made_of_dotted


def build_objectives(config: PPOConfig, controller: KLController) -> list[Objective]:
    """Every objective with a coefficient, in the order in which they are summed; ``controller`` holds the KL's weight.

    Raises ConfigError for a path in ``ppo.objectives`` that names no objective, or two of one name.
    """
    found: list[Objective] = [PolicyObjective(config.cliprange)]
    if config.estimator == "gae":
        found.append(ValueObjective(config.vf_coef, config.cliprange_value))
    if config.kl_in == "loss" and controller.kl_coef > 0:
        found.append(KLObjective(controller, config.kl_estimator))
    if config.entropy_coef > 0:
        found.append(EntropyObjective(-config.entropy_coef))
    if config.ce_coef > 0:
        found.append(CrossEntropyObjective(config.ce_coef))
    found += [_of_path(path) for path in config.objectives]
    names = [objective.name for objective in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"--ppo.objectives: two objectives are called {twice!r}; give each a name of its own.")
    return found


def _of_path(path: str) -> Objective:
    objective: Objective = made_of_dotted(path, "ppo.objectives")
    if not (callable(objective) and isinstance(getattr(objective, "name", None), str)):
        raise ConfigError(f"--ppo.objectives {path}: an objective is called with an UpdateBatch and has a name.")
    if not isinstance(getattr(objective, "coefficient", None), int | float):
        raise ConfigError(f"--ppo.objectives {path}: an objective has a coefficient, a number.")
    return objective
