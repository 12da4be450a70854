"""JSON lines files that grow with a run: append, read, and cut back to a step."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cagsr.errors import RunError
from cagsr.support.atomic import disk_errors, write_bytes_atomically

_INFINITIES = {"Infinity": math.inf, "-Infinity": -math.inf}


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: 0-d tensors and NumPy numbers as Python's, NaN as null, infinities as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # tensors and NumPy scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows, each on a line of its own. Finite floats read back as the same float.

    NaN is written as null and infinities as the texts ``Infinity`` and ``-Infinity``, which JSON has no numbers for.
    """
    text = "".join(json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with disk_errors(path), open(path, "a", encoding="utf-8") as stream:
        stream.write(text)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file; null inside a row stays None, the infinities' texts become floats.

    Lines at the end that a kill left half written are left out; RunError where one before the last valid one is no object.
    """
    return [
        {key: _INFINITIES.get(value, value) if isinstance(value, str) else value for key, value in row.items()}
        for _, row in _parsed(path)
    ]


def _parsed(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Each whole line as bytes with what it says."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    # After the last newline comes nothing, or a line that was cut short even if it happens to be valid JSON.
    rows: list[tuple[bytes, dict[str, Any]]] = []
    broken = None
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError:
            broken = broken or number
            continue
        if broken is not None or not isinstance(row, dict):
            raise RunError(f"{path}, line {broken or number} is not a JSON object: mend or remove that line.")
        rows.append((line, row))
    return rows


def truncate_lines(path: Path, step: int) -> int:
    """Drop the rows with a ``step`` above ``step`` and half-written lines at the end, atomically; tells how many whole rows.

    Raises RunError where a line is not a JSON object with a ``step``.
    """
    rows = _parsed(path)
    for number, (_, row) in enumerate(rows, start=1):
        if not isinstance(row.get("step"), int):
            raise RunError(f"{path}, line {number} has no step: mend or remove that line.")
    kept = [line for line, row in rows if row["step"] <= step]
    content = b"".join(line + b"\n" for line in kept)
    if path.exists() and content != path.read_bytes():
        write_bytes_atomically(path, content)
    return len(rows) - len(kept)
