"""Tables of texts, on a terminal and as Markdown, and values as JSON has them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table


def rich_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], **columns: Any) -> Table:
    """A table for a terminal, its numbers (all columns but the first) to the right; ``columns`` as rich's ``add_column``."""
    table = Table(title=title)
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", **columns)
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as Markdown, without the title."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def plain(value: Any) -> Any:
    """Return a value as JSON has it: tuples and arrays as lists, numbers that are not finite as null, dates and so on as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy's
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)
