"""One training of a new version, as files in a folder: what it is about, what a process has done of it, what came of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cagsr.config import DataConfig, EvalConfig, RunConfig, TrainConfig
from cagsr.parse import parse_command, to_yaml
from cagsr.serving.prompt_store import KeptPrompt
from cagsr.serving.settings import ServeConfig
from cagsr.support.atomic import replace_folder, write_text_atomically

FOLDER = "training"


@dataclass(frozen=True)
class Job:
    """What a training is about; its folder holds prompts, and is deleted with the last of them."""

    number: int
    """Of the version it makes."""
    parent: int
    """The version that is served, from which the adapter goes on."""
    trained: int
    """Number of the newest prompt that was there."""
    removed: int
    """How many of them had been removed."""


@dataclass(frozen=True)
class JobFolder:
    """The folder of a job."""

    path: Path

    @property
    def run(self) -> Path:
        """The run folder of ``cagsr train``."""
        return self.path / "run"

    @property
    def prompts(self) -> Path:
        """The prompts to train on."""
        return self.path / "prompts.jsonl"

    @property
    def held_out(self) -> Path:
        """The prompts that the versions are compared on."""
        return self.path / "held_out.jsonl"

    @property
    def said(self) -> Path:
        """What the process wrote to standard error."""
        return self.path / "said.txt"

    def begin(
        self, job: Job, config: ServeConfig, prompts: Sequence[KeptPrompt], held_out: Sequence[Mapping[str, Any]]
    ) -> None:
        """Make the folder, whole or not at all, readable by its owner alone."""
        with replace_folder(self.path) as folder:
            made = JobFolder(folder)
            (folder / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")
            (folder / "serve.yaml").write_text(to_yaml(config), encoding="utf-8")
            write_rows(made.prompts, [{"prompt": one.prompt} for one in prompts])
            write_rows(made.held_out, held_out)
            folder.chmod(0o700)

    def job(self) -> Job | None:
        """The job; None: there is none."""
        try:
            return Job(**json.loads((self.path / "job.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def config(self) -> ServeConfig:
        """The server's settings when it began."""
        return parse_command(ServeConfig, ["--config", str(self.path / "serve.yaml")], prog="cagsr serve")

    def verdict(self) -> dict[str, Any] | None:
        """What came of it; None: nothing yet."""
        try:
            found: dict[str, Any] = json.loads((self.path / "verdict.json").read_text(encoding="utf-8"))
            return found
        except FileNotFoundError:
            return None

    def decide(self, verdict: Mapping[str, Any]) -> None:
        """Write what came of it."""
        write_text_atomically(self.path / "verdict.json", json.dumps(verdict, indent=1, allow_nan=False))

    def training(self, job: Job, config: ServeConfig, adapter: Path | None) -> TrainConfig:
        """The settings of ``cagsr train``; ``adapter`` is that of the version served, None: the base."""
        learning = config.learning
        return TrainConfig(
            model=config.model,
            data=DataConfig(str(self.prompts), long_prompts="drop"),
            output_dir=str(self.run),
            lora=replace(config.lora, start=None if adapter is None else str(adapter)),
            sampling=config.sampling,
            attention=config.attention,
            salience=config.salience,
            reward=config.reward,
            ppo=config.ppo,
            evaluation=EvalConfig(str(self.held_out), held_out=learning.held_out_prompts, every=0, samples=0),
            monitors=replace(config.monitors, kl=learning.kl, kl_action="stop"),
            # No prompt in the run's logs; resumed wherever a pause has ended the process.
            run=RunConfig(
                steps=learning.steps,
                batch_size=learning.batch_size,
                seed=(config.seed + job.number) % 2**31,  # each training draws anew
                save_every=max(1, learning.steps // 10),
                save_total_limit=1,
                sample_rows=0,
                resume=True,
            ),
        )


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, whole or not at all."""
    write_text_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
