"""What can be set about the quickstart: the sizes, for the curious and for tests. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QuickstartConfig:
    """See the whole loop work: make a small model, improve it on prompts without answers, compare."""

    output_dir: str = "quickstart"
    """Folder for everything. An earlier quickstart in it is replaced, but for the models of stages 1 and 2, which are used
    again if they were made with the same settings."""
    seed: int = 0
    """Seeds the prompts, the random weights and the sampling."""
    overwrite: bool = False
    """Make the models of stages 1 and 2 anew, too."""
    pairs: int = 12000
    """Prompt-answer pairs that the start model learns from."""
    sft_steps: int = 900
    """Gradient steps of the start model and the judge."""
    prompts: int = 2000
    """Prompts without answers for CAGSR."""
    held_out: int = 200
    """Prompts of the comparison, which neither model has seen."""
    steps: int = 60
    """Steps of CAGSR."""
    batch_size: int = 16
    """Prompts per step, eight answers each."""
