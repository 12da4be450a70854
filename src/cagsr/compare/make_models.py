"""The work of the jobs that make something: data, starts, reward models, policies."""

import dataclasses
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from rich.console import Console

from cagsr.compare.jobs import Job, changed, contents, write_file
from cagsr.compare.plan import START, Plan, RewardModelPlan
from cagsr.config import DpoConfig, RewardModelConfig, TrainConfig
from cagsr.errors import ConfigError, RunError
from cagsr.parse import parse_command
from cagsr.support.atomic import remove_folder
from cagsr.support.progress import resting


def run_command(plan: Plan, command: str, **names: object) -> None:
    """Run a command of the plan, with {python}, {work} and ``names`` filled in; raises ConfigError where it fails."""
    words = [plan.fill(word, python=sys.executable, **names) for word in shlex.split(command)]
    try:
        with resting():  # the command tells of its own work
            subprocess.run(words, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"the plan's command '{shlex.join(words)}' failed ({error}); run it by hand to see why."
        ) from error


UNFINISHED = "unfinished"
"""What the record of a start says while its command runs."""


def make_start(plan: Plan, job: Job) -> None:
    """Make the supervised start of a seed; raises ConfigError where the command leaves no model.

    A start that another command made is deleted and made again. Comparisons of older versions kept no record of the
    command: theirs are taken as they are where the job was not done for another plan.
    """
    assert job.seed is not None
    folder = plan.start_folder(job.seed)
    begun = _begun(plan, job)
    known = _read(begun)
    done = job.facts(plan).get("fingerprint", job.fingerprint)
    same = known == job.training if known is not None else done == job.fingerprint
    whole = (folder / "config.json").exists() and any(folder.glob("*.safetensors"))
    if not (same and whole):
        # A command that can go on from what it left may; weights without an end are no model.
        goes_on = known == f"{UNFINISHED} {job.training}" and not (folder / "config.json").exists()
        if not goes_on:
            _clear(folder)
        write_file(begun, f"{UNFINISHED} {job.training}")
        run_command(plan, plan.start, seed=job.seed, output=folder)
        if not (folder / "config.json").exists():
            raise ConfigError(f"the plan's start command left no model in {folder}; it must write one to {{output}}.")
    write_file(begun, job.training)


def make_reward_model(plan: Plan, job: Job) -> None:
    """Train a reward model from its seed's start."""
    from cagsr.preferences.reward_trainer import train_reward_model

    assert job.seed is not None
    spec = plan.reward_models[job.target]
    folder = plan.reward_model_folder(job.target, job.seed)
    settings = _pair_settings(plan, spec, job.seed, folder) | _filled(plan, spec.set)
    if spec.held_out is not None:
        settings["eval_data"] = plan.fill(spec.held_out)
    train_reward_model(_config(RewardModelConfig, [], settings, plan.folder / "configs" / f"{job.name}.yaml"))


def make_policy(plan: Plan, job: Job) -> Path:
    """Train a method's policy (RL or DPO), or go on with it after a stop; returns the folder of the model."""
    assert job.seed is not None
    method = plan.methods[job.target]
    model = plan.model_folder(job.target, job.seed)
    same = _is_same(plan, job)
    run, file = plan.method_folder(job.target, job.seed), plan.folder / "configs" / f"{job.name}.yaml"
    if method.kind == "dpo":
        from cagsr.preferences.dpo import train_dpo

        settings = _pair_settings(plan, plan.reward_models[str(method.reward_model)], job.seed, run)
        settings["model.path"] = str(plan.model_folder(method.after or START, job.seed))
        pairs: DpoConfig = _config(DpoConfig, method.configs, settings | _filled(plan, method.set), file)
        if not same:
            _begin_anew(plan, job, run)
        return train_dpo(pairs)
    if same and (model / "config.json").exists():
        return model
    config = reward_settings(plan, job.target, job.seed, file)

    from cagsr.train import train

    if not same:
        _begin_anew(plan, job, run)
    how = dataclasses.replace(config.run, resume=(run / "config.yaml").exists(), overwrite=False)
    console = Console(file=sys.stderr, soft_wrap=True, highlight=False, width=120)
    train(dataclasses.replace(config, run=how), console=console)
    return model


def _begin_anew(plan: Plan, job: Job, folder: Path) -> None:
    """Delete what another version of a job left and say whose the folder is now."""
    _clear(folder)  # first: a kill between the two must not make the old result pass for the new one
    write_file(_begun(plan, job), f"{job.training}\n{json.dumps(contents(job.reads))}")


def _is_same(plan: Plan, job: Job) -> bool:
    """Whether a job's folder holds, or is to hold, what the job makes with the plan and the files as they are now."""
    # Comparisons of older versions kept no hashes of the files.
    training, _, inputs = (_read(_begun(plan, job)) or "").partition("\n")
    return training == job.training and not changed(json.loads(inputs or "{}"))


def _begun(plan: Plan, job: Job) -> Path:
    """The file that says by its training hash, and hashes of the files read, what a job's folder holds or is to hold."""
    return plan.folder / "begun" / f"{job.name}.txt"


def _read(record: Path) -> str | None:
    return record.read_text(encoding="utf-8") if record.exists() else None


def _clear(folder: Path) -> None:
    """Delete a job's folder; raises RunError where it holds a run that is still being written."""
    from cagsr.runs.folder import is_being_written

    if is_being_written(folder):
        raise RunError(f"{folder} is being written by another process: wait for it, or give the plan another 'work'.")
    if folder.exists() or folder.is_symlink():
        remove_folder(folder)


def reward_settings(plan: Plan, name: str, seed: int, keep: Path | None = None) -> TrainConfig:
    """The settings that a method trains with, or would if it only scores (best of N, validity); written to ``keep``."""
    method = plan.methods[name]
    settings: dict[str, Any] = {
        **_filled(plan, plan.set),
        **_filled(plan, method.set),
        "model.path": str(plan.model_folder(method.after or START, seed)),
        "data.path": plan.fill(plan.files.train),
        "evaluation.path": plan.fill(plan.files.held_out),
        "output_dir": str(plan.method_folder(name, seed)),
        "run.seed": seed,
    }
    if method.reward_model is not None and method.kind != "dpo":
        settings["reward.models"] = [str(plan.reward_model_folder(method.reward_model, seed))]
        settings["reward.model_weights"] = [method.reward_model_weight]
    config: TrainConfig = _config(TrainConfig, [*plan.configs, *method.configs], settings, keep)
    return config


def _filled(plan: Plan, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the plan with {work} filled in, in texts and lists of texts."""

    def fill(value: Any) -> Any:
        if isinstance(value, list):
            return [fill(one) for one in value]
        return plan.fill(value) if isinstance(value, str) else value

    return {key: fill(value) for key, value in settings.items()}


def _pair_settings(plan: Plan, spec: RewardModelPlan, seed: int, folder: Path) -> dict[str, Any]:
    """What training on preference pairs needs to be told, for a reward model and for DPO."""
    return {
        "model.path": str(plan.start_folder(seed)),
        "data.path": plan.fill(spec.data),
        "output_dir": str(folder),
        "num_pairs": spec.num_pairs,
        "seed": seed,
        "overwrite": folder.exists(),
    }


def _config(kind: Any, files: list[str], settings: dict[str, Any], keep: Path | None) -> Any:
    """Config files, then dotted settings over them; written to ``keep`` so that a person can repeat the run by hand."""
    flags = [flag for file in files for flag in ("--config", file)]
    with TemporaryDirectory() as folder:
        file = keep or Path(folder) / "settings.yaml"
        given = {key: value for key, value in settings.items() if value is not None}
        write_file(file, yaml.safe_dump(given, sort_keys=False))
        return parse_command(kind, [*flags, "--config", str(file)], prog="cagsr compare")
