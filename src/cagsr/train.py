"""The whole method as one run: load, prepare, then sample -> score -> reward -> update until done.

This file reads from top to bottom as what ``cagsr train`` does. What a step does is in ``training/``, files
are in ``runs/``.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.markdown import Markdown
from transformers import TrainerState

from cagsr.config import AssociationsConfig, ProbeConfig, TrainConfig, validate
from cagsr.errors import ConfigError, MonitorStop, RolloutError
from cagsr.evaluation.held_out import choose_metric
from cagsr.flow import EncodedPrompt
from cagsr.models.generation import generation_notes
from cagsr.models.load import LoadedModel, go_on_from, load_model
from cagsr.models.sharding import gathered
from cagsr.prompts.prepare import prepare_prompts
from cagsr.prompts.stream import PromptSet
from cagsr.reward.association import Associations
from cagsr.reward.build import build_reward, reward_warnings
from cagsr.reward.learn_associations import associations_of
from cagsr.reward.learn_probe import Probe, probe_check, probe_of
from cagsr.reward.resources import resources_of
from cagsr.reward.settings import TERMS
from cagsr.reward.term import SUPPORT
from cagsr.reward.trainer_calls import TrainerCalls
from cagsr.rollout.episodes import EpisodePlayer, Player
from cagsr.rollout.played_user import conversation_task
from cagsr.rollout.step_player import StepPlayer
from cagsr.runs.folder import ASSOCIATIONS, PROBE
from cagsr.runs.numbers import StepNumbers
from cagsr.runs.saved import dtype_note
from cagsr.scoring.reference_answers import ReferencePlayer, reference_of
from cagsr.support.clock import operators_of, profile_text
from cagsr.support.extras import install_command, is_installed
from cagsr.support.processes import (
    broadcast,
    check_precision,
    check_processes,
    gather_objects,
    start_accelerator,
)
from cagsr.support.progress import say, shown, working
from cagsr.tasks.segments import SegmentEncoder
from cagsr.tasks.steps import splitter
from cagsr.tasks.task import load_task
from cagsr.training.curriculum import build_curriculum
from cagsr.training.forecaster import Forecaster, watching
from cagsr.training.monitors import Alert, Monitors
from cagsr.training.ppo import PPO
from cagsr.training.record import RunRecord, check_tracker
from cagsr.training.step import Steps

LearnedT = TypeVar("LearnedT", AssociationsConfig, ProbeConfig)
BLIND = 0.05
"""Of the AUC: a probe that one fitted anew is so much better than no longer sees."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished run hands back: its folder, and the held-out metrics of the starting and of the trained model."""

    folder: Path
    """The trained model is in ``folder / "final"``."""
    first: dict[str, float]
    last: dict[str, float]


@shown("cagsr train")
def train(
    config: TrainConfig, *, console: Console | None = None, after_step: Callable[[int], None] | None = None
) -> TrainResult:
    """Run CAGSR: PPO on unlabelled prompts with the reward read from the model's own attention.

    What was chosen and how it goes is said on ``console`` (None: standard output). ``after_step`` is called by the main process
    with the number of each step that is written, 0 for the start's evaluation.

    Raises:
        CagsrError: bad input of any kind; the last good checkpoint is intact.
    """
    console = console or Console(soft_wrap=True, highlight=False)
    validate(config)
    config = watching(config)
    check_tracker(config.run.tracker)
    server = config.rollout.timeout + config.rollout.wait if config.rollout.engine == "vllm" else 0.0
    accelerator = start_accelerator(cpu=config.model.device == "cpu", longest_wait=2 * server)
    sizes = (config.run.batch_size, config.sampling.num_generations, config.ppo.num_mini_batches)
    check_processes(*sizes, accelerator.num_processes)
    main = accelerator.is_main_process
    set_seed(config.run.seed)

    loaded = load_model(config.model, config.lora)
    if config.lora.start is not None:
        go_on_from(loaded.model, config.lora.start)
    loaded.stops(config.sampling)  # refuses stop strings that no answer could say
    check_precision(accelerator, loaded.compute_dtype)
    train_set, held_out = _prompt_sets(config, loaded)
    metric = choose_metric(config.evaluation.metric, held_out.prompts)
    _check_columns(config, [*train_set.prompts, *held_out.prompts])
    _check_media(config, [*train_set.prompts, *held_out.prompts])
    associations = _associations(config, loaded, train_set, accelerator, console)
    probe = _probe(config, loaded, train_set, accelerator, console)
    reward = build_reward(
        config.reward,
        device=loaded.device,
        resources=resources_of(loaded, associations, train_set.frequency, config.sampling.temperature),
        reduce=lambda tensor: accelerator.reduce(tensor, reduction="sum"),
    )
    player = _player(config, loaded, train_set, held_out)
    ppo = PPO(config, loaded, reward, accelerator, player, None if probe is None else probe.layer)
    monitors = Monitors(config.monitors, Forecaster.of(config))
    stream = build_curriculum(
        config.curriculum,
        train_set,
        config.run.batch_size // accelerator.num_processes,
        config.run.seed,
        accelerator.process_index,
        accelerator.num_processes,
        partial(gather_objects, accelerator=accelerator),
    )
    # Initialisation is the same in every process, sampling is not.
    set_seed(config.run.seed + 1 + accelerator.process_index)

    # Everything that can be refused has been checked: only now is anything written.
    record = RunRecord(config, accelerator, ppo, monitors, stream, train_set.frequency, associations, probe)
    try:
        trainer = TrainerCalls(_trainer_state(config, train_set, broadcast(record.history, accelerator), accelerator))
        if main:
            count = "streamed" if config.data.streaming else str(len(train_set.prompts))
            precision = dtype_note(config.run.save_dtype, loaded, "--run.save_dtype")
            own = (precision, *generation_notes(loaded, config.sampling), *ppo.sampler.notes, *record.notes)
            if config.supervision.mode == "s3ft":
                own = (
                    "S3FT: one answer of each group is imitated and nothing is reinforced, so estimator, KL, entropy bonus and the "
                    "penalty on cut answers have no effect.",
                    *own,
                )
            notes = (*loaded.notes, *train_set.notes, *own, *metric.notes, *reward_warnings(config.reward))
            # Paths, tokens and templates are no markup.
            console.print(f"CAGSR {config.model.path} -> {config.output_dir}", markup=False, style="bold")
            judged = f"{len(held_out.prompts)} held out, judged by {metric.name}."
            console.print(f"  Prompts: {count} to train on, {judged}", markup=False)
            for note in notes:
                console.print(f"  {note}", highlight=False, markup=False)
        steps = Steps(config, loaded, ppo, stream, held_out.prompts, metric, monitors, record, trainer)
        written = after_step if after_step is not None and main else lambda step: None
        if record.first_step == 0:
            steps.start()
            written(0)
        timings: list[dict[str, float]] = []
        operators: list[tuple[str, float, int]] = []
        # The first step pays for what is set up once; recording slows a step down, so its times are left out.
        recorded = min(record.first_step + 2, config.run.steps) if config.run.profile else None
        with working("step", config.run.steps, done=record.first_step) as bar:
            numbers = StepNumbers(bar)
            step = record.first_step
            while step < monitors.last_step(config.run.steps):
                step += 1
                with operators_of(operators, loaded.device) if step == recorded else nullcontext():
                    taken = steps.step(step, numbers)
                written(step)
                if step != recorded:
                    timings.append(taken)
        if config.run.profile and main:
            text = profile_text(timings, operators)
            record.profile(text)
            console.print(Markdown(text))
        if probe is not None and config.reward.probe.check and config.reward.grounding_probe.weight != 0:
            _check_probe(config, loaded, train_set, probe, ppo, record, step)
        best = record.load_best()
        evaluations = record.evaluations(until=best) or [{}]
        made_by = step if best is None else best
        saved = record.finish(loaded, train_set, evaluations[0], evaluations[-1], len(held_out.prompts), made_by)
    except (MonitorStop, RolloutError):
        # All processes have it. The launcher stops the others as soon as one has left: not before the main one is done.
        ppo.sampler.close()
        accelerator.wait_for_everyone()
        raise
    finally:
        ppo.sampler.close()
        record.close()
    folder = Path(config.output_dir)
    if main:
        console.print(saved, markup=False)
        curves = f"its curves in {folder / 'curves.png'}"
        if not is_installed("matplotlib"):
            curves = f"its metrics in {folder / 'metrics.jsonl'} (no curves.png: {install_command('pages')})"
        if best is not None and best != step:
            console.print(
                f"The best evaluation was that of step {best}: final/ is the policy as it was then.", markup=False
            )
        console.print(f"Done: the trained model is in {folder / 'final'}, {curves}.", markup=False)
        told = [
            f"{name} {evaluations[0][key]:.3f} -> {evaluations[-1][key]:.3f}"
            for name, key in (("sampled", "eval/metric"), ("greedy", "eval/metric_greedy"))
            if key in evaluations[-1]
        ]
        if evaluations[-1]:
            console.print(f"Held out, {metric.name}: {', '.join(told)}.", markup=False)
    return TrainResult(folder, evaluations[0], evaluations[-1])


def _check_columns(config: TrainConfig, prompts: Sequence[EncodedPrompt]) -> None:
    """ConfigError where a term that is computed needs what no row has."""
    for term in TERMS:
        settings = getattr(config.reward, term.name)
        if (
            config.reward.asks(term.name)
            and (missing := term.missing(settings, [one.prompt for one in prompts])) is not None
        ):
            flag = f"{term.name}.weight" if settings.weight != 0 else f"watched {term.name}"
            raise ConfigError(f"--reward.{flag}: no row of {config.data.path} has {missing}.")


def _check_media(config: TrainConfig, prompts: Sequence[EncodedPrompt]) -> None:
    """ConfigError where images or sounds meet what does not read them."""
    kinds = {"images": any(one.prompt.images for one in prompts), "sounds": any(one.prompt.sounds for one in prompts)}
    kind = next((name for name, there in kinds.items() if there), None)
    if kind is None:
        return
    refused = {
        "--rollout.engine vllm": config.rollout.engine == "vllm",  # it is sent token ids alone
        "--rollout.task": config.rollout.task is not None,  # what stands behind an image is not read turn by turn
        "--conversation.user": config.conversation.user is not None,
        "--reward.grounding_probe.weight": config.reward.needs(SUPPORT),  # the probe is learned from texts
    }
    for flag in (flag for flag, asked in refused.items() if asked):
        raise ConfigError(
            f"{flag}: works with texts alone, and prompts of {config.data.path} have {kind}; leave it out."
        )


def _player(config: TrainConfig, loaded: LoadedModel, train_set: PromptSet, held_out: PromptSet) -> Player | None:
    """Who makes episodes of several turns; None: one answer to each prompt is all."""
    if config.supervision.mode != "none":
        for one in train_set.prompts:
            reference_of(one.prompt)  # what lacks one is told before training begins
        return ReferencePlayer(loaded, config.sampling.num_generations, config.sampling.max_new_tokens)
    encoder = SegmentEncoder(loaded, config.salience, train_set.frequency)
    split = splitter(config.steps)
    if split is not None:
        return StepPlayer(loaded, split, encoder)
    everyone = [*train_set.prompts, *held_out.prompts]
    task = load_task(config.rollout.task) or conversation_task(config.conversation, config.model, everyone)
    if task is None:
        return None
    return EpisodePlayer(loaded, task, encoder, loaded.room_for_prompts(config.sampling.max_new_tokens))


def _kept(settings: LearnedT, config: TrainConfig, name: str, accelerator: Accelerator) -> LearnedT:
    """Settings of what is learned before the first step: a resumed run reads what it has kept under this name."""
    stored = Path(config.output_dir) / name
    # Whether the file is there is asked once: the answer must be the same in every process.
    if broadcast(lambda: settings.path is None and config.run.resume and stored.exists(), accelerator):
        return dataclasses.replace(settings, path=str(stored))
    return settings


def _associations(
    config: TrainConfig, loaded: LoadedModel, train_set: PromptSet, accelerator: Accelerator, console: Console
) -> Associations | None:
    """Learn the associations from the starting model's own answers where the reward needs them, or read them again."""
    if not config.reward.needs("associations"):
        return None
    settings = _kept(config.reward.associations, config, ASSOCIATIONS, accelerator)
    started = time.perf_counter()
    found = associations_of(
        loaded,
        train_set.prompts,
        config.sampling,
        settings,
        seed=config.run.seed,
        batch_size=config.rollout.batch_size,
        accelerator=accelerator,
    )
    if accelerator.is_main_process:
        origin = settings.path or f"{found.answers:,} of the model's own answers"
        seconds = time.perf_counter() - started
        console.print(
            f"Associations from {origin} ({seconds:.0f} s): {len(found.prompt_index):,} words and pairs of prompts, "
            f"{found.strength.nnz:,} associations.",
            markup=False,
        )
    return found


def _probe(
    config: TrainConfig, loaded: LoadedModel, train_set: PromptSet, accelerator: Accelerator, console: Console
) -> Probe | None:
    """Learn the grounding probe from the starting model's own answers where the reward needs it, or read it again."""
    if not config.reward.needs(SUPPORT):
        return None
    settings = _kept(config.reward.probe, config, PROBE, accelerator)
    started = time.perf_counter()
    found = probe_of(
        loaded,
        train_set.prompts,
        train_set.frequency,
        config.sampling,
        settings,
        seed=config.run.seed,
        batch_size=config.rollout.batch_size,
        accelerator=accelerator,
    )
    if accelerator.is_main_process:
        seconds = time.perf_counter() - started
        origin = "" if settings.path is None else f" of {settings.path}"
        console.print(
            f"Grounding probe{origin} ({seconds:.0f} s): layer {found.layer.layer}, fitted on {found.supported:,} words that "
            f"prompts hold and {found.swapped:,} swapped out of them; AUC {found.auc:.3f} on other prompts.",
            markup=False,
        )
    return found


def _check_probe(
    config: TrainConfig, loaded: LoadedModel, train_set: PromptSet, probe: Probe, ppo: PPO, record: RunRecord, step: int
) -> None:
    """Say whether the probe still sees what it is paid for, once the policy has moved."""
    how = (train_set.prompts, train_set.frequency, config.sampling, config.reward.probe, ppo.reference)
    with gathered(loaded.model):  # by every process: a frozen model that is divided is put together by all of them
        kept, again = probe_check(loaded, probe, *how, seed=config.run.seed, batch_size=config.rollout.batch_size)
    told = f"Grounding probe on the trained policy's answers: AUC {kept:.3f}, fitted anew on them {again:.3f}."
    if kept < again - BLIND:
        told += (
            " The policy has moved to where it no longer sees: hold it nearer (--ppo.kl_coef), or pay the probe less."
        )
        record.warn([Alert("grounding_probe", step, told, "warn")])
    if ppo.accelerator.is_main_process:
        say(told)


def _trainer_state(
    config: TrainConfig, train_set: PromptSet, history: list[dict[str, Any]], accelerator: Accelerator
) -> TrainerState:
    """The run as transformers' trainers describe theirs, for reward functions written for them."""
    run = config.run
    epochs = math.ceil(run.steps * run.batch_size / len(train_set.prompts))
    return TrainerState(
        max_steps=run.steps,
        num_train_epochs=epochs if train_set.reopen is None else sys.maxsize,  # as transformers says of a stream
        train_batch_size=run.batch_size,
        logging_steps=1,
        eval_steps=config.evaluation.every,
        save_steps=run.save_every,
        log_history=history,
        is_local_process_zero=accelerator.is_local_main_process,
        is_world_process_zero=accelerator.is_main_process,
    )


def _prompt_sets(config: TrainConfig, loaded: LoadedModel) -> tuple[PromptSet, PromptSet]:
    """Training and held-out prompts, every one short enough for the model's context."""
    limit = loaded.room_for_prompts(config.sampling.max_new_tokens)
    training = prepare_prompts(config.data, config.salience, loaded.tokenizer, max_length=limit, vision=loaded.vision)
    if config.evaluation.path is not None:
        data = dataclasses.replace(
            config.data, path=config.evaluation.path, limit=config.evaluation.held_out, streaming=False
        )
        return training, prepare_prompts(
            data,
            config.salience,
            loaded.tokenizer,
            max_length=limit,
            frequency=training.frequency,
            vision=loaded.vision,
        )
    held_out = config.evaluation.held_out
    fifth = max(1, len(training.prompts) // 5)
    if training.reopen is None and held_out > fifth:
        held_out = fifth if len(training.prompts) > 1 else 0
        note = f"Held out: {held_out} prompts instead of {config.evaluation.held_out}, at most a fifth of {len(training.prompts)}."
        training = dataclasses.replace(training, notes=(*training.notes, note))
    return training.split(held_out, config.run.seed)
