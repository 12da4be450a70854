"""What a training's process does: ``cagsr train`` on the kept prompts, then the comparison with the version that is served.

In the server's folder lies the job, and whatever an earlier process has done of it. SIGINT says that the time is up: what has
been trained until then is finished.
"""

from __future__ import annotations

import fcntl
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cagsr.config import DataConfig, TrainConfig
from cagsr.errors import CagsrError, DataError, MonitorStop
from cagsr.flow import EncodedPrompt
from cagsr.models.load import LoadedModel, load_model
from cagsr.prompts.load import load_rows
from cagsr.prompts.prepare import encode_texts
from cagsr.prompts.salience import DocumentFrequency
from cagsr.runs.checkpoint import latest_checkpoint
from cagsr.runs.lines import read_lines
from cagsr.runs.reward import with_run_reward
from cagsr.serving.compare_versions import compare, reasons_against
from cagsr.serving.job import FOLDER, Job, JobFolder, write_rows
from cagsr.serving.judges import judging_of_run
from cagsr.serving.policies import Policies
from cagsr.serving.prompt_store import PromptText
from cagsr.serving.settings import ServeConfig
from cagsr.serving.versions import Versions
from cagsr.train import train


def work(folder: Path) -> None:
    """Train, compare, write the verdict; CagsrError where the training can't be done."""
    place, versions = JobFolder(folder / FOLDER), Versions(folder)
    job, config = place.job(), place.config()
    if job is None or place.verdict() is not None:
        return
    config, _ = with_run_reward(config, config.sampling.temperature)
    adapter = None if job.parent == 0 else versions.path(job.parent)
    training = place.training(job, config, adapter)
    reasons, started = list[str](), time.monotonic()
    if not (place.run / "final").is_dir():
        _leave_out_unusable(place, config)
        reasons = _train(training)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left is short
    why: dict[str, Any] = {"steps": _steps(place.run), "seconds": round(time.monotonic() - started, 1)}
    why["prompts"] = len(_texts(place.prompts))
    if not reasons:
        compared = _compare(place, job, config, versions)
        reasons = reasons_against(compared, config.monitors, config.learning.kl)
        why |= asdict(compared)
    place.decide({"accepted": not reasons, "reasons": reasons, **why})


def _train(training: TrainConfig) -> list[str]:
    """Train to the end, or to what is done when the time is up; gives why there is nothing to compare."""
    try:
        train(training)
    except MonitorStop as stop:
        return [f"A monitor stopped the training: {str(stop).partition(' The checkpoint ')[0]}"]
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        done = latest_checkpoint(Path(training.output_dir) / "checkpoints").step
        if done == 0:
            return ["The time was up before a step was done (--learning.seconds)."]
        train(replace(training, run=replace(training.run, steps=done)))
    return []


def _compare(place: JobFolder, job: Job, config: ServeConfig, versions: Versions) -> Any:
    judging = judging_of_run(str(place.run))
    loaded = load_model(config.model, for_training=False)
    policies = Policies(loaded, versions)
    policies.load(job.number, place.run / "final-adapter")
    limit = loaded.room_for_prompts(config.sampling.max_new_tokens)
    prompts = [
        one
        for text in _texts(place.held_out)
        for one in encode_texts(
            [text], loaded.tokenizer, judging.salience, limit, judging.frequency, vision=loaded.vision
        )
    ]
    warnings = {str(row["name"]): str(row["sentence"]) for row in read_lines(place.run / "warnings.jsonl")}
    return compare(policies, job.parent, job.number, prompts, judging, config.sampling, warnings)


def _leave_out_unusable(place: JobFolder, config: ServeConfig) -> None:
    """Take the prompts out of the files that training would refuse (without a word that matters, too long)."""
    loaded = load_model(config.model, for_training=False)
    limit = loaded.room_for_prompts(config.sampling.max_new_tokens)
    texts = _texts(place.prompts)
    while True:
        prompts = [one for text in texts for one in _encoded(text, loaded, config, limit, None)]
        frequency = DocumentFrequency.fit(one.prompt for one in prompts)
        kept = [text for text in texts if _encoded(text, loaded, config, limit, frequency)]
        if len(kept) == len(texts):
            break
        texts = kept
    held_out = [text for text in _texts(place.held_out) if _encoded(text, loaded, config, limit, frequency)]
    if not kept or not held_out:
        raise DataError(
            "None of the kept prompts can be trained on or compared with: they have no words, or are too long."
        )
    write_rows(place.prompts, [{"prompt": text} for text in kept])
    write_rows(place.held_out, [{"prompt": text} for text in held_out])


def _encoded(
    text: PromptText, loaded: LoadedModel, config: ServeConfig, limit: int, frequency: DocumentFrequency | None
) -> Sequence[EncodedPrompt]:
    """The prompt, in a list; an empty one where it can't be used."""
    try:
        return encode_texts([text], loaded.tokenizer, config.salience, limit, frequency, vision=loaded.vision)
    except DataError:
        return []


def _texts(path: Path) -> list[PromptText]:
    return [row.values["prompt"] for row in load_rows(DataConfig(str(path)))]


def _steps(run: Path) -> int:
    rows = read_lines(run / "metrics.jsonl")
    return int(rows[-1]["step"]) if rows else 0


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no process of an earlier server works here any more."""
    with open(folder / "training.lock", "a", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def begin(folder: str) -> int:
    """Work on the job in a server's folder; gives the exit status."""
    try:
        with _alone(Path(folder)):
            work(Path(folder))
    except CagsrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
