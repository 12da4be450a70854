"""Answers of a judgement that is not finished, kept as soon as they are sampled: of a large model they take many minutes."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cagsr.compare.jobs import Job, contents, write_file
from cagsr.compare.plan import Plan
from cagsr.evaluation.matched_entropy import SampledAnswers
from cagsr.support.atomic import remove_folder


@dataclass(frozen=True)
class KeptAnswers:
    """The answers that a job has sampled so far, a file a setting."""

    folder: Path
    key: str
    """Hash of everything that they depend on."""

    def get(self, name: str, sample: Callable[[], tuple[SampledAnswers, float]]) -> tuple[SampledAnswers, float]:
        """The answers under a setting with their temperature: those that are kept, else what ``sample`` makes, kept."""
        file = self.folder / f"{name}.json"
        if file.exists():
            told = json.loads(file.read_text(encoding="utf-8"))
            if told["key"] == self.key:
                arrays = (np.array(told[part], dtype=np.float64) for part in ("entropy", "tokens", "ended"))
                return SampledAnswers(tuple(told["texts"]), *arrays), told["temperature"]
        answers, temperature = sample()
        row = {name: column.tolist() for name, column in vars(answers).items() if name != "texts"}
        row |= {"key": self.key, "temperature": temperature, "texts": list(answers.texts)}
        write_file(file, json.dumps(row))
        return answers, temperature


@contextmanager
def kept_answers(plan: Plan, job: Job) -> Iterator[KeptAnswers]:
    """What a judgement that was stopped has left; deleted where the block ends without an exception."""
    folder = plan.results_folder / "unfinished" / job.name
    facts = [job.fingerprint, contents([*job.reads, *job.judged_on])]
    yield KeptAnswers(folder, hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest())
    if folder.exists():
        remove_folder(folder)
