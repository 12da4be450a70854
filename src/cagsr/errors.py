"""The errors a user can cause and mend.

Every one of them is a single sentence that names what is wrong (the file and row, the flag, the model) and says what to
do. The command line prints that sentence and exits with status 2; the library raises it.
"""


class CagsrError(Exception):
    """Bad input of any kind. ``str(error)`` is the one sentence the user reads."""


class DataError(CagsrError):
    """A data file, row or column that can't be used."""


class ModelError(CagsrError):
    """A model or tokenizer that can't be loaded or used."""


class ConfigError(CagsrError):
    """A config key or value, or a flag, that can't be used."""


class AttentionError(ModelError):
    """A model whose attention can't be read, or a capture used in a way it can't serve."""


class RewardError(CagsrError):
    """A reward term that fails or gives a value that is not a finite number."""


class RolloutError(CagsrError):
    """An engine that samples the answers and can't be reached, or gave what can't be used."""


class RunError(CagsrError):
    """A run folder or a checkpoint that can't be used."""


class MonitorStop(CagsrError):
    """A monitor set to ``stop`` fired: the run ended early, its last checkpoint intact."""
