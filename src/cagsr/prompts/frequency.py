"""The IDF table that a training run leaves in its folder, read again for scoring as in training."""

from __future__ import annotations

import json
from pathlib import Path

from cagsr.errors import RunError
from cagsr.prompts.salience import DocumentFrequency


def read_frequency(run: str | None) -> DocumentFrequency | None:
    """Read the IDF table that a training run left in its folder; None without a run.

    Raises:
        RunError: no such folder, or no table in it.
    """
    if run is None:
        return None
    file = Path(run) / "frequency.json"
    try:
        return DocumentFrequency.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RunError(
            f"--salience_from {run}: no readable {file.name} there; name the folder of a cagsr train run."
        ) from error
