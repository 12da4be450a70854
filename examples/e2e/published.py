"""Published outputs of TGen and SC-LSTM on E2E NLG, judged by our checker and by the script that was published with them.

    git clone https://github.com/tuetschek/e2e-cleaning runs/e2e-cleaning
    python -m examples.e2e.published --outputs runs/e2e-cleaning
    python -m examples.e2e.published --outputs runs/e2e-cleaning --results runs/pretrained/results

The repository belongs to Dušek, Howcroft & Rieser, "Semantic Noise Matters for Neural Natural Language Generation" (INLG
2019): five runs of each system, trained on clean or on original (noisy) data. Their outputs are judged on the test prompts of
this example. With ``--results`` the answers of a comparison are judged by both as well. The published script is run as it is,
with a stand-in for the one class it takes from TGen.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tyro

from cagsr.errors import DataError
from cagsr.evaluation.metrics import rouge_l
from examples.e2e.facts import parse
from examples.e2e.prepare import SHARED, load_rows
from examples.e2e.slots import check

SYSTEMS = {
    "sclstm": "SC-LSTM",
    "tgen-minus": "TGen without a reranker",
    "tgen-std": "TGen",
    "tgen-plus": "TGen, oracle reranker",
}
TRAINED = {"train-clean_test-clean": "clean data", "train-orig_test-clean": "noisy data"}
_SLOTS = {
    "eatType": "eat_type",
    "priceRange": "price_range",
    "customer rating": "rating",
    "familyFriendly": "family_friendly",
}


@dataclass(frozen=True)
class Options:
    """Judge the outputs."""

    outputs: Path
    """A clone of tuetschek/e2e-cleaning."""
    data: Path = SHARED
    """As for ``examples.e2e.prepare``; its test prompts are judged."""
    results: tuple[Path, ...] = ()
    """Folders of results of ``cagsr compare`` whose answers are judged too."""


@dataclass(frozen=True)
class Errors:
    """Slot errors of some texts."""

    slots: int
    missed: int
    """Without those of which another value is said."""
    added: int
    wrong: int

    @property
    def rate(self) -> float:
        """Slot error rate in % of the slots."""
        return 100.0 * (self.missed + self.added + self.wrong) / self.slots

    def __str__(self) -> str:
        parts = (f"{100.0 * count / self.slots:.2f}" for count in (self.missed, self.added, self.wrong))
        return f"{self.rate:.2f} ({' + '.join(parts)})"


Judge = Callable[[str, str], tuple[int, int, int, int]]
"""From a meaning representation and a text to its slots and how many are missed, added and wrong."""


def main(options: Options) -> None:
    """Print a table."""
    _, test = load_rows(options.data)
    references = {key_of(row["prompt"]): row["references"] for row in test}
    judges: dict[str, Judge] = {"our checker": ours, "the published script": published(options.outputs)}
    print(
        "| system | "
        + "".join(f"SER by {name} (missed + added + wrong), % | " for name in judges)
        + "ROUGE-L | texts |"
    )
    print("| --- |" + " --- |" * (len(judges) + 2))
    for name, texts in texts_of(options):
        some = [(meaning, text) for meaning, text in texts if key_of(meaning) in references]
        if not some:
            raise DataError(f"{name}: none of its {len(texts)} prompts is a test prompt of {options.data}.")
        cells = [str(errors(judge, some)) for judge in judges.values()]
        rouge = np.mean([rouge_l(text, references[key_of(meaning)]) for meaning, text in some])
        print(f"| {name} | {' | '.join(cells)} | {rouge:.3f} | {len(some)} |", flush=True)


def texts_of(options: Options) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Each system's name with its texts and their meaning representations: the published ones, people's, a comparison's."""
    for folder, trained in TRAINED.items():
        for system, name in SYSTEMS.items():
            yield f"{name}, {trained}", outputs_of(options.outputs, folder, system)
    _, test = load_rows(options.data)
    yield "people's sentences", [(row["prompt"], text) for row in test for text in row["references"]]
    for results in options.results:
        found: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for file in sorted(results.glob("*-seed*.json")):
            told = json.loads(file.read_text(encoding="utf-8"))
            for how, texts in told.get("texts", {}).items():
                if len(texts) == len(told["prompts"]):
                    found.setdefault((told["method"], how), []).extend(zip(told["prompts"], texts, strict=True))
        for (method, how), texts in found.items():
            yield f"{results}: {method}, {how}", texts


def outputs_of(folder: Path, trained: str, system: str) -> list[tuple[str, str]]:
    """The texts of all runs of a published system. Raises DataError where a file is missing or has another number of lines."""
    file = folder / "cleaned-data" / "test-fixed.csv"
    if system == "sclstm":
        meanings = lines_of(folder / "system-outputs" / "sclstm_MRs-for-eval.txt")
    else:
        with _readable(file), file.open(encoding="utf-8", newline="") as stream:
            meanings = list(dict.fromkeys(row["mr"] for row in csv.DictReader(stream)))
    found: list[tuple[str, str]] = []
    for run in range(5):
        path = folder / "system-outputs" / trained / f"{system}.run{run}.txt"
        texts = lines_of(path)
        if len(texts) != len(meanings):
            raise DataError(f"{path} has {len(texts)} lines for {len(meanings)} meaning representations.")
        found += zip(meanings, texts, strict=True)
    return found


def lines_of(path: Path) -> list[str]:
    """The lines of a file."""
    with _readable(path):
        return path.read_text(encoding="utf-8").splitlines()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} can't be read; give --outputs a clone of tuetschek/e2e-cleaning.") from error


def key_of(meaning: str) -> tuple[tuple[str, str], ...]:
    """What two ways to write one meaning representation have in common."""
    return tuple(sorted(parse(meaning)))


def errors(judge: Judge, texts: Sequence[tuple[str, str]]) -> Errors:
    """The errors of some texts."""
    return Errors(*(sum(column) for column in zip(*(judge(meaning, text) for meaning, text in texts), strict=True)))


def ours(meaning: str, text: str) -> tuple[int, int, int, int]:
    """What our checker finds."""
    found = check(meaning, text)
    return found.facts, len(found.missed) - len(found.wrong), len(found.added), len(found.wrong)


def published(folder: Path) -> Judge:
    """What the published script finds."""
    script = load_script(folder / "slot_error.py")

    def judge(meaning: str, text: str) -> tuple[int, int, int, int]:
        facts = [Item(_SLOTS.get(slot, slot), value) for slot, value in parse(meaning)]
        said, asked = script.reclassify_mr(text, Meaning(facts))
        added, missed, wrong, *_ = script.check_output(asked, said)
        return len(facts), missed, added, wrong

    return judge


@dataclass(frozen=True)
class Item:
    """A slot with its value, as the script reads them."""

    slot: str
    value: str


@dataclass(frozen=True)
class Meaning:
    """Stand-in for TGen's class of meaning representations."""

    dais: Sequence[Item] = field(default_factory=tuple)


def load_script(path: Path) -> Any:
    """Load the published script, with stand-ins for what it imports of TGen and for tables that it reads files with."""
    stand_ins: Mapping[str, Mapping[str, Any]] = {"tgen": {}, "tgen.data": {"DA": Meaning}, "pandas": {}}
    before = {name: sys.modules.get(name) for name in stand_ins}
    with _readable(path):
        path.read_bytes()
    spec = importlib.util.spec_from_file_location("published_slot_error", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        for name, attributes in stand_ins.items():
            sys.modules[name] = ModuleType(name)
            vars(sys.modules[name]).update(attributes)
        spec.loader.exec_module(module)
    finally:
        for name, known in before.items():
            if known is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = known
    return module


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
