"""What can be set about the quickstart: the sizes, for the curious and for tests. Imports nothing heavy."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from cagsr.config.ranges import PositiveInt, RunSeed


@dataclass(frozen=True)
class QuickstartConfig:
    """See the whole loop work: make a small model, improve it on prompts without answers, compare."""

    output_dir: str = "quickstart"
    """Folder for everything. An earlier quickstart in it is replaced, but for the models of stages 1 and 2, which are used
    again if they were made with the same settings."""
    seed: RunSeed = 0
    """Seeds the prompts, the random weights and the sampling."""
    overwrite: bool = False
    """Make the models of stages 1 and 2 anew, too."""
    pairs: PositiveInt = 12000
    """Prompt-answer pairs that the start model learns from."""
    sft_steps: PositiveInt = 900
    """Gradient steps of the start model and the judge."""
    prompts: Annotated[int, Ge(2)] = 2000
    """Prompts without answers for CAGSR."""
    held_out: Annotated[int, Ge(2)] = 200
    """Prompts of the comparison, which neither model has seen."""
    steps: PositiveInt = 60
    """Steps of CAGSR."""
    batch_size: PositiveInt = 16
    """Prompts per step, eight answers each."""
