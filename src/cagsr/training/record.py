"""What one training run writes and restores: the folder, the tracker and the checkpoints of all processes together.

Only the main process owns the folder; on the others every method does its share of the collective work and writes
nothing.
"""

import dataclasses
import importlib.util
import json
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from cagsr.config import TrainConfig
from cagsr.config.validation import flatten
from cagsr.errors import ConfigError
from cagsr.models.generation import generation_notes, served_with
from cagsr.models.load import LoadedModel
from cagsr.models.sharding import unsharded
from cagsr.parse import to_yaml
from cagsr.prompts.salience import DocumentFrequency
from cagsr.prompts.stream import PromptSet
from cagsr.reward.association import Associations
from cagsr.reward.learn_probe import Probe
from cagsr.runs.best import FOLDER, Best
from cagsr.runs.checkpoint import CheckpointState, latest_checkpoint, load_checkpoint, rng_state, save_checkpoint
from cagsr.runs.final import model_card, save_final
from cagsr.runs.fingerprint import fingerprint_training
from cagsr.runs.folder import ASSOCIATIONS, FREQUENCY, PROBE, PROFILE, RunFolder, flat_tree
from cagsr.runs.lines import read_lines
from cagsr.runs.reward import write_scales
from cagsr.runs.saved import Saved, chosen_dtype, greedy_probe, saved_facts
from cagsr.support.atomic import disk_errors, write_text_atomically
from cagsr.support.extras import is_installed
from cagsr.support.processes import broadcast, gather_objects
from cagsr.support.progress import working
from cagsr.tasks.curriculum import Curriculum
from cagsr.training.monitors import Alert, Monitors
from cagsr.training.ppo import PPO

TOLD = ("sampling", "attention", "salience", "reward", "ppo", "lora", "run.steps", "run.batch_size", "run.seed")
"""What the card tells, by the beginnings of the names."""

_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}
"""For each tracker (accelerate's own are used) the modules of which one must be there."""


class RunRecord:
    """The record of a run, opened once everything that can be refused has been checked.

    ``ppo``, ``monitors`` and ``stream`` are what a checkpoint holds the state of. The IDF table, the associations and
    the probe are kept in the folder for what judges answers by this reward.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        ppo: PPO,
        monitors: Monitors,
        stream: Curriculum,
        frequency: DocumentFrequency,
        associations: Associations | None = None,
        probe: Probe | None = None,
    ) -> None:
        self._config, self._accelerator = config, accelerator
        self._ppo, self._monitors, self._stream = ppo, monitors, stream
        self._folder: RunFolder | None = None
        self._warnings: list[str] = []
        self.notes: tuple[str, ...] = ()
        """What the user should know about how the folder was opened."""
        run = config.run
        self._best: Best | None = None
        if run.load_best_model_at_end or config.monitors.forecast_action == "stop":
            self._best = Best(Path(config.output_dir) / FOLDER, ppo.modules(), config.lora.r > 0, accelerator)

        def opened() -> tuple[Path | None, int]:
            # How this start treats the folder is no setting of the run: the stored file must be usable for another.
            plain = dataclasses.replace(run, resume=False, overwrite=False, profile=False)
            self._folder = folder = RunFolder.open(
                config.output_dir,
                to_yaml(dataclasses.replace(config, run=plain)),
                resume=run.resume,
                overwrite=run.overwrite,
                fingerprint=fingerprint_training(config),
            )
            write_text_atomically(folder.path / FREQUENCY, json.dumps(frequency.to_json()))
            if associations is not None:
                write_text_atomically(folder.path / ASSOCIATIONS, json.dumps(associations.to_json()))
            if probe is not None:
                write_text_atomically(folder.path / PROBE, json.dumps(probe.to_json()))
            self.notes = folder.notes
            return folder.checkpoint, folder.step

        checkpoint, self.first_step = broadcast(opened, accelerator)
        """Steps already done."""
        if self._best is not None:
            self._best.resumed(self.first_step)
        if checkpoint is not None:
            self._restore(checkpoint)
            if self._folder is not None:
                write_scales(self._folder.path, ppo.reward.state_dict())  # as old as the checkpoint
        self._tracker = start_tracker(
            run.tracker if accelerator.is_main_process else "none", Path(config.output_dir), dataclasses.asdict(config)
        )

    def log(
        self,
        step: int,
        metrics: Mapping[str, float],
        timings: Mapping[str, float],
        samples: Sequence[Mapping[str, Any]],
        held_out: Sequence[Mapping[str, Any]],
    ) -> None:
        """Write a step's metrics, timings, sample answers, and answers to held-out prompts (for the run's page)."""
        if self._folder is None:
            return
        self._folder.append("metrics", step, metrics)
        if timings:
            self._folder.append("timings", step, timings)
        self._folder.append("samples", step, *samples)
        self._folder.append("held_out", step, *held_out)
        if self._tracker is not None:
            self._tracker.log({name: float(value) for name, value in metrics.items() if value is not None}, step=step)

    def warn(self, alerts: Sequence[Alert]) -> None:
        """Write what the monitors said."""
        for alert in alerts:
            if alert.action == "note":
                continue
            self._warnings.append(f"step {alert.step}: {alert.sentence}")
            if self._folder is not None:
                row = {"name": alert.name, "sentence": alert.sentence, "action": alert.action}
                self._folder.append("warnings", alert.step, row)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the policy where this evaluation is the best so far, and the run is to end with the best."""
        if self._best is not None:
            self._best.observe(step, metrics)

    def load_best(self) -> int | None:
        """Make the policy of the best evaluation the policy again, where the run is to end with it; its step."""
        return None if self._best is None else self._best.restore()

    @working("saving a checkpoint")
    def save(self, step: int) -> None:
        """Write a checkpoint of all processes; the previous one stays valid until this one is in place."""
        states = gather_objects([rng_state()], self._accelerator)
        parts: dict[str, PPO | Curriculum | Monitors] = {
            "ppo": self._ppo,
            "stream": self._stream,
            "monitors": self._monitors,
        }
        extra = {name: part.state_dict() for name, part in parts.items()} | {"warnings": list(self._warnings)}
        run, main, folder = self._config.run, self._folder is not None, Path(self._config.output_dir)
        if self._folder is not None:
            self._folder.sync_logs()
        save_checkpoint(
            folder / "checkpoints", step, self._checkpoint_state(extra), run.save_total_limit, states, write=main
        )
        if self._best is not None:
            self._best.settled()
        if main:
            write_scales(folder, self._ppo.reward.state_dict())
        self._accelerator.wait_for_everyone()

    def where_to_resume(self) -> str:
        """A sentence telling from where the run can go on."""
        if self._folder is None:
            return ""
        latest = latest_checkpoint(self._folder.checkpoints).path
        if latest is None:
            return f"No checkpoint was written yet in {self._folder.path}."
        return f"The checkpoint {latest} is intact; go on from it with --resume."

    def history(self) -> list[dict[str, Any]]:
        """The metrics of each step so far, oldest first; empty on all processes but the main one."""
        return [] if self._folder is None else read_lines(self._folder.metrics)

    def evaluations(self, until: int | None = None) -> list[dict[str, float]]:
        """The held-out metrics of each evaluation so far, oldest first; none of a step after ``until``."""
        rows = [row for row in self.history() if until is None or row["step"] <= until]
        found = [{name: value for name, value in row.items() if name.startswith("eval/")} for row in rows]
        return [row for row in found if row]

    @working("saving the model")
    def finish(
        self,
        loaded: LoadedModel,
        train_set: PromptSet,
        before: Mapping[str, float],
        after: Mapping[str, float],
        held_out: int,
        steps: int,
    ) -> str:
        """Write the final model with its card and the curves, and close the folder; every process may hold a part of the model.

        ``steps`` is how many made it. Gives what the user is told of the model that was saved, empty where this process saves
        none. Raises RunError where what was saved is not what was trained (``runs/saved.py``).
        """
        config, found = self._config, ""
        model = unsharded(loaded, config.model, config.lora, keep=self._folder is not None)
        if self._folder is not None:
            assert model is not None  # of those that write
            served = "`generation_config.json` has `model.generate()` sample as training did."
            generation = "".join(f"\n- {note}" for note in (served, *generation_notes(loaded, config.sampling)))
            name = self._folder.path.name

            def card(saved: Saved) -> str:
                return model_card(
                    name=name,
                    base_model=config.model.path,
                    data=config.data.path,
                    prompts=len(train_set.prompts),
                    steps=steps,
                    command=f"cagsr train --config {shlex.quote(f'{config.output_dir}/config.yaml')} --output_dir again",
                    settings={key: value for key, value in flatten(config).items() if key.startswith(TOLD)},
                    estimator=config.ppo.estimator,
                    pipeline_tag=loaded.architecture.pipeline_tag,
                    before=before,
                    after=after,
                    held_out=held_out,
                    warnings=self._warnings,
                    saved=saved_facts(loaded, saved) + generation,
                    versions={package: version(package) for package in ("cagsr", "torch", "transformers", "peft")},
                )

            # What was put together from shards lies elsewhere than the policy.
            compared = dataclasses.replace(loaded, model=model, device=next(model.parameters()).device)
            saved = save_final(
                self._folder.path,
                model,
                loaded,
                greedy_probe(compared, train_set.prompts, config.sampling.max_new_tokens),
                card,
                chosen_dtype(config.run.save_dtype, loaded),
                served_with(loaded, config.sampling),
            )
            found = saved.sentence
            if is_installed("matplotlib"):
                from cagsr.runs.curves import plot_training_curves

                plot_training_curves(self._folder.metrics, self._folder.path / "curves.png", title=name)
        if self._tracker is not None:
            self._tracker.finish()
        self.close()
        self._accelerator.wait_for_everyone()
        return found

    def profile(self, text: str) -> None:
        """Write where the time went."""
        if self._folder is not None:
            write_text_atomically(self._folder.path / PROFILE, text)

    def close(self) -> None:
        """Release the folder's lock."""
        if self._folder is not None:
            self._folder.close()

    def _checkpoint_state(self, extra: Mapping[str, Any]) -> CheckpointState:
        return CheckpointState(self._ppo.modules(), {"adamw": self._ppo.optimizer}, extra, self._config.lora.r > 0)

    @working("reading the checkpoint")
    def _restore(self, path: Path) -> None:
        rank, processes = self._accelerator.process_index, self._accelerator.num_processes
        _, extra, notes = load_checkpoint(path, self._checkpoint_state({}), rank, processes, seed=self._config.run.seed)
        self._ppo.load_state_dict(extra["ppo"])
        self._stream.load_state_dict(extra["stream"])
        self._monitors.load_state_dict(extra["monitors"])
        self._warnings = list(extra["warnings"])
        self.notes = (*self.notes, *notes)


def flat_settings(config: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Nested settings as ``section.key`` with values every tracker takes (lists and None become text)."""
    return {
        key: value if isinstance(value, str | int | float) else str(value) for key, value in flat_tree(config).items()
    }


def check_tracker(name: str) -> None:
    """See that a tracker's package is there, before any model is loaded; ConfigError with what to install if it is not."""
    packages = _PACKAGES.get(name, ())
    if packages and not any(importlib.util.find_spec(package) for package in packages):
        raise ConfigError(f'run.tracker is {name} but its package is not installed: pip install "cagsr[{name}]".')


def start_tracker(name: str, folder: Path, config: Mapping[str, Any]) -> GeneralTracker | None:
    """Start a tracker for a run that ``check_tracker`` has passed, with its nested settings; ``none`` gives None.

    TensorBoard and Weights & Biases write to ``folder/trackers``; Weights & Biases and Trackio name the run after
    ``folder`` in the project ``cagsr``.
    """
    if name == "none":
        return None
    PartialState()  # accelerate's trackers ask it whether they run on the main process
    tracker: GeneralTracker
    if name == "tensorboard":
        tracker = TensorBoardTracker(folder.name, logging_dir=folder / "trackers")
    elif name == "wandb":
        with disk_errors(folder / "trackers"):
            (folder / "trackers").mkdir(parents=True, exist_ok=True)
        tracker = WandBTracker("cagsr", name=folder.name, dir=str(folder / "trackers"))
    else:
        tracker = TrackioTracker("cagsr", name=folder.name)
    tracker.start()
    tracker.store_init_configuration(flat_settings(config))
    return tracker
