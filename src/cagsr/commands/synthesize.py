"""``cagsr synthesize``: machine-made preference pairs from supervised ones."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from cagsr.commands.inputs import write_rows
from cagsr.config import SynthesizeConfig as Config
from cagsr.support.progress import say, working

if TYPE_CHECKING:
    from cagsr.preferences.corrupt import SupervisedPair


def run(config: Config) -> None:
    """Write the pairs to ``config.output`` and say how many of each kind there are."""
    from cagsr.preferences.corrupt import synthesize

    pairs = read_supervised(config)
    with working("making mistakes"):
        rows, failed = synthesize(pairs, config.corruption, config.seed, config.num_pairs)
    write_rows(rows, config.output)
    counts = Counter(row["corruption"] for row in rows)
    kinds = ", ".join(f"{counts[kind]:,} {kind}" for kind in sorted(counts))
    notes = [f"{config.output}: {len(rows):,} pairs ({kinds})."]
    if config.num_pairs is not None and len(rows) < config.num_pairs:
        notes.append(
            f"{config.data.path} allows no more than these; the seed's other {config.num_pairs - len(rows):,} would repeat some."
        )
    elif failed:
        notes.append(f"{failed:,} times an answer was too short for a mistake.")
    say(*notes)


@working("reading the pairs")
def read_supervised(config: Config) -> list[SupervisedPair]:
    """Read the supervised pairs; DataError for a row without text or messages in one of the columns."""
    from cagsr.errors import DataError
    from cagsr.preferences.corrupt import SupervisedPair
    from cagsr.prompts.chat import TEMPLATE_COLUMNS
    from cagsr.prompts.load import load_rows
    from cagsr.prompts.render import text_of
    from cagsr.prompts.rows import split_texts

    flags = {config.data.prompt_column: "--data.prompt_column", config.completion_column: "--completion_column"}
    pairs = []
    for row in split_texts(load_rows(config.data, [config.completion_column]), config.data):
        where = f"{row.source}, row {row.number}"
        for column, flag in flags.items():
            if column not in row.values:
                present = ", ".join(map(str, row.values)) or "none"
                raise DataError(f"{where}: no column '{column}' (columns here: {present}); name it with {flag}.")
            if not text_of(row.values[column], f"{where}: column '{column}'").strip():
                raise DataError(f"{where}: column '{column}' is empty; fill it or remove the row.")
        kept = {name: row.values[name] for name in TEMPLATE_COLUMNS if row.values.get(name)}
        prompt, answer = row.values[config.data.prompt_column], row.values[config.completion_column]
        pairs.append(SupervisedPair(prompt, answer, columns=kept))
    return pairs
