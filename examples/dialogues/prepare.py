"""Dialogues for a pretrained model: pairs of some domains, dialogues to replay, and turns of domains that none of these has.

    python -m examples.dialogues.prepare --work runs/dialogues --model gemma3-270m

writes, from ``shared/data/dialogues`` (Schema-Guided Dialogue, services by dialogue):

- ``base/``: the model with a chat template, if it has none (links to its files, and Gemma's template in the tokens it has),
- ``sft.jsonl``: conversations up to an answer, of the trained domains,
- ``prompts.jsonl`` and ``held_out.jsonl``: other dialogues of these domains, their first turns, to be asked turn by turn,
- ``test.jsonl``: conversations of unseen domains up to a user's message, with the answer as ``references``.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from cagsr.errors import DataError
from cagsr.support.atomic import replace_folder
from examples.e2e.prepare import write_jsonl

UNSEEN = ("Flights", "Movies", "Banks", "Homes")
"""Domains that are tested on and never trained on."""
SHARED = Path(__file__).parents[3] / "shared" / "data" / "dialogues" / "train.jsonl"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Options:
    """Write the files."""

    work: Path = Path("runs/dialogues")
    """Folder to write into."""
    model: Path | None = None
    """Folder of the pretrained model; None: no ``base/`` is written."""
    data: Path = SHARED
    """The dialogues."""
    pairs: int = 320
    """Answers for the supervised start."""
    held_out: int = 40
    """Dialogues to watch training with."""
    test: int = 200
    """Turns of unseen domains."""
    turns: int = 3
    """Turns of a dialogue that are asked."""
    seed: int = 0
    """Seeds which dialogues and turns are taken."""


def main(options: Options) -> None:
    """Write the files and say what they hold. DataError where the data is not there, or too small."""
    dialogues = read(options.data)
    draw = random.Random(options.seed)
    draw.shuffle(dialogues)
    seen = [one["messages"] for one in dialogues if not domains(one) & set(UNSEEN)]
    unseen = [one for one in dialogues if domains(one) <= set(UNSEEN)]
    started, asked = seen[: options.pairs], seen[options.pairs :]
    if len(asked) <= options.held_out or len(unseen) < 2:
        raise DataError(
            f"{options.data}: {len(seen)} dialogues of trained domains are too few for {options.pairs} pairs."
        )
    test = [row for one in unseen for row in turns_of(one["messages"], options.turns + 2, domain=min(domains(one)))]
    draw.shuffle(test)
    talks = [{"messages": beginning(messages, options.turns)} for messages in asked]
    files: dict[str, Sequence[Mapping[str, Any]]] = {
        "sft": [{"messages": some_answer(messages, draw)} for messages in started],
        "held_out": talks[: options.held_out],
        "prompts": talks[options.held_out :],
        "test": test[: options.test],
    }
    options.work.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        write_jsonl(options.work / f"{name}.jsonl", rows)
    if options.model is not None:
        write_base(options.model, options.work / "base")
    print(
        f"{options.work}: {', '.join(f'{len(rows)} {name}' for name, rows in files.items())}; unseen: {', '.join(UNSEEN)}"
    )


def read(path: Path) -> list[dict[str, Any]]:
    """The dialogues whose turns alternate and begin with the user."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the dialogues with --data.")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        row for row in rows if all(one["role"] == ("user", "assistant")[n % 2] for n, one in enumerate(row["messages"]))
    ]


def domains(row: Mapping[str, Any]) -> set[str]:
    """Of the services (``Flights_1``) the domains."""
    return {service.partition("_")[0] for service in row["services"]}


def beginning(messages: Messages, turns: int) -> Messages:
    """The first turns with their answers."""
    return messages[: 2 * turns]


def some_answer(messages: Messages, draw: random.Random) -> Messages:
    """The conversation up to one of its first five answers."""
    return messages[: 2 * draw.randint(1, min(5, len(messages) // 2))]


def turns_of(messages: Messages, most: int, domain: str) -> list[dict[str, Any]]:
    """Each of the turns from the second on, as a prompt with its answer; the first has no history."""
    return [
        {"prompt": messages[: 2 * turn + 1], "references": [messages[2 * turn + 1]["content"]], "domain": domain}
        for turn in range(1, min(most, len(messages) // 2))
    ]


def write_base(model: Path, folder: Path) -> None:
    """The model's files by links, with a chat template."""
    if not (model / "config.json").is_file():
        raise DataError(f"{model}: no model there (config.json); give its folder with --model.")
    with replace_folder(folder) as new:
        for file in sorted(model.iterdir()):
            if file.is_file() and file.name != "chat_template.jinja":
                (new / file.name).symlink_to(file.resolve())
        own = model / "chat_template.jinja"
        (new / "chat_template.jinja").write_text(
            own.read_text(encoding="utf-8") if own.is_file() else TEMPLATE, encoding="utf-8"
        )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
