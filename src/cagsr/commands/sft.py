"""``cagsr sft``: supervised fine-tuning on prompt-completion pairs, a start for ``cagsr train``."""

from __future__ import annotations

from cagsr.config import SftConfig as Config

__all__ = ["Config", "run"]


def run(config: Config) -> None:
    """Train and leave the model in ``config.output_dir``."""
    from cagsr.sft import sft

    sft(config)
