"""What one training run writes and restores: the folder, the tracker and the checkpoints of all processes together.

Only the main process owns the folder; on the others every method does its share of the collective work and writes
nothing.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from cagsr.config import TrainConfig
from cagsr.config.validation import flatten
from cagsr.models.generation import generation_notes, served_with
from cagsr.models.load import LoadedModel
from cagsr.models.sharding import unsharded
from cagsr.parse import to_yaml
from cagsr.prompts.promptset import PromptSet
from cagsr.prompts.salience import DocumentFrequency
from cagsr.prompts.stream import PromptStream
from cagsr.reward.association import Associations
from cagsr.runs.checkpoint import CheckpointState, collect_state, latest_checkpoint, load_checkpoint, save_checkpoint
from cagsr.runs.final import model_card, save_final
from cagsr.runs.fingerprint import fingerprint_run
from cagsr.runs.folder import ASSOCIATIONS, FREQUENCY, PROFILE, RunFolder
from cagsr.runs.lines import read_lines
from cagsr.runs.reward import write_scales
from cagsr.runs.rng import rng_state
from cagsr.runs.saved import Saved, answer_probe, chosen_dtype, saved_facts
from cagsr.runs.tracker import start_tracker
from cagsr.support.atomic import write_text_atomically
from cagsr.support.extras import is_installed
from cagsr.support.processes import broadcast, gather_objects
from cagsr.support.progress import working
from cagsr.training.monitors import Alert, Monitors
from cagsr.training.ppo import PPO

TOLD_SETTINGS = (
    "sampling",
    "attention",
    "salience",
    "reward",
    "ppo",
    "lora",
    "run.steps",
    "run.batch_size",
    "run.seed",
)
"""What the card tells, by the beginnings of the names."""


class RunRecord:
    """The record of a run, opened once everything that can be refused has been checked.

    ``ppo``, ``monitors`` and ``stream`` are what a checkpoint holds the state of. The IDF table and the associations are kept
    in the folder for what judges answers by this reward.

    Raises:
        RunError: the folder holds another run, is in use, or can't be written or resumed.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        ppo: PPO,
        monitors: Monitors,
        stream: PromptStream,
        frequency: DocumentFrequency,
        associations: Associations | None = None,
    ) -> None:
        self._config, self._accelerator = config, accelerator
        self._ppo, self._monitors, self._stream = ppo, monitors, stream
        self._folder: RunFolder | None = None
        self._warnings: list[str] = []
        self.notes: tuple[str, ...] = ()
        """What the user should know about how the folder was opened."""
        run = config.run

        def opened() -> tuple[Path | None, int]:
            # How this start treats the folder is no setting of the run: the stored file must be usable for another.
            plain = dataclasses.replace(run, resume=False, overwrite=False, profile=False)
            self._folder = folder = RunFolder.open(
                config.output_dir,
                to_yaml(dataclasses.replace(config, run=plain)),
                resume=run.resume,
                overwrite=run.overwrite,
                fingerprint=fingerprint_run(config),
            )
            write_text_atomically(folder.path / FREQUENCY, json.dumps(frequency.to_json()))
            if associations is not None:
                write_text_atomically(folder.path / ASSOCIATIONS, json.dumps(associations.to_json()))
            self.notes = folder.notes
            return folder.checkpoint, folder.step

        checkpoint, self.first_step = broadcast(opened, accelerator)
        """Steps already done."""
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
        """Write a step's metrics, timings, sample answers, and answers to held-out prompts (for the run's page).

        Raises:
            RunError: the disk is full or a file can't be written (so for all methods).
        """
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
            self._warnings.append(f"step {alert.step}: {alert.sentence}")
            if self._folder is not None:
                row = {"name": alert.name, "sentence": alert.sentence, "action": alert.action}
                self._folder.append("warnings", alert.step, row)

    @working("saving a checkpoint")
    def save(self, step: int) -> None:
        """Write a checkpoint of all processes; the previous one stays valid until this one is in place."""
        states = gather_objects([rng_state()], self._accelerator)
        extra = {
            "ppo": self._ppo.state_dict(),
            "stream": self._stream.state_dict(),
            "monitors": self._monitors.state_dict(),
            "warnings": list(self._warnings),
        }
        state = self._checkpoint_state(extra)
        collected = collect_state(state, keep=self._folder is not None)
        if self._folder is not None:
            self._folder.sync_logs()
            keep = max(1, self._config.run.save_total_limit)
            save_checkpoint(self._folder.checkpoints, step, state, keep, states, collected)
            write_scales(self._folder.path, self._ppo.reward.state_dict())
        self._accelerator.wait_for_everyone()

    def where_to_resume(self) -> str:
        """A sentence telling from where the run can go on."""
        if self._folder is None:
            return ""
        latest = latest_checkpoint(self._folder.checkpoints)
        if latest.path is None:
            return f"No checkpoint was written yet in {self._folder.path}."
        return f"The checkpoint {latest.path} is intact; go on from it with --resume."

    def history(self) -> list[dict[str, Any]]:
        """The metrics of each step so far, oldest first; empty on all processes but the main one."""
        return [] if self._folder is None else read_lines(self._folder.metrics)

    def evaluations(self) -> list[dict[str, float]]:
        """The held-out metrics of each evaluation so far, oldest first."""
        found = [{name: value for name, value in row.items() if name.startswith("eval/")} for row in self.history()]
        return [row for row in found if row]

    @working("saving the model")
    def finish(
        self,
        loaded: LoadedModel,
        train_set: PromptSet,
        before: Mapping[str, float],
        after: Mapping[str, float],
        held_out: int,
    ) -> str:
        """Write the final model with its card and the curves, and close the folder; every process may hold a part of the model.

        Returns:
            What the user is told of the model that was saved; empty where this process saves none.

        Raises:
            RunError: what was saved is not what was trained (``runs/saved.py``).
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
                    steps=config.run.steps,
                    command=f"cagsr train --config {shlex.quote(f'{config.output_dir}/config.yaml')} --output_dir again",
                    settings={key: value for key, value in flatten(config).items() if key.startswith(TOLD_SETTINGS)},
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
                answer_probe(compared, train_set.prompts, config.sampling.max_new_tokens),
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
        return CheckpointState(
            modules=self._ppo.modules(),
            optimizers={"adamw": self._ppo.optimizer},
            extra=extra,
            trainable_only=self._config.lora.r > 0,
        )

    @working("reading the checkpoint")
    def _restore(self, path: Path) -> None:
        found = load_checkpoint(
            path,
            self._checkpoint_state({}),
            self._accelerator.process_index,
            self._accelerator.num_processes,
            seed=self._config.run.seed,
        )
        self._ppo.load_state_dict(found.extra["ppo"])
        self._stream.load_state_dict(found.extra["stream"])
        self._monitors.load_state_dict(found.extra["monitors"])
        self._warnings = list(found.extra["warnings"])
        self.notes = (*self.notes, *found.notes)
