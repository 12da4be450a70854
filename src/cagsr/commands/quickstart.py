"""``cagsr quickstart``: the whole loop in minutes, offline and from nothing, with a small model before and after."""

from __future__ import annotations

from cagsr.quickstart.settings import QuickstartConfig as Config

__all__ = ["Config", "run"]


def run(config: Config) -> None:
    """Make the start and the judge, train, compare, and write what was found."""
    from cagsr.quickstart.stages import run_stages

    run_stages(config)
