"""``cagsr diagnose``: is the reward worth a training run for this model and these prompts?"""

import dataclasses
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from cagsr.commands.inputs import answer_scorer, read_prompts, table_console
from cagsr.config import (
    AttentionConfig,
    DataConfig,
    LoraConfig,
    ModelConfig,
    PPOConfig,
    RewardConfig,
    SalienceConfig,
    SamplingConfig,
)
from cagsr.config.ranges import NonNegativeFloat, NonNegativeInt, OutputFile, PositiveInt, Seed
from cagsr.support.progress import say, working

if TYPE_CHECKING:
    from cagsr.diagnosis.diagnose import Diagnosis
    from cagsr.diagnosis.forecast import LeashForecast
    from cagsr.reward.association import Associations


@dataclass(frozen=True)
class PilotConfig:
    """The run that is thought of, a few steps of which are trained to see how long its reward would help."""

    steps: NonNegativeInt = 0
    """Steps that the run would have. Above 0 ten of them are trained with what is recommended, and kept nowhere. 0: none are."""
    kl_coefs: list[NonNegativeFloat] = field(default_factory=lambda: [0.02, 0.05, 0.15])
    """Leashes to try, each in a pilot of its own."""
    batch_size: PositiveInt = 8
    """Prompts a step."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(frozen=True)
class Config:
    """Sample answers and measure what each reward term sees in them, before anyone spends a training run."""

    model: ModelConfig
    data: DataConfig
    checker: str | None = None
    """Dotted path of f(prompts, completions, **columns) -> numbers, higher is better: the truth to test against.
    None: ROUGE-L where the rows have a reference (completion, reference or references), else no truth."""
    num_prompts: Annotated[int, Ge(2)] = 96
    """Prompts, drawn from the file by the seed."""
    attacked_prompts: NonNegativeInt = 48
    """For so many of the prompts, answers made to fool the reward are measured too (the prompt itself, a list of its words,
    another prompt's answer, ...); 0: none."""
    output: OutputFile | None = None
    """JSON file for all numbers; beside it, with the ending .yaml, the recommendation for cagsr train --config."""
    markdown: OutputFile | None = None
    """Also write the report as Markdown to this file."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    salience: SalienceConfig = field(default_factory=SalienceConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    pilot: PilotConfig = field(default_factory=PilotConfig)
    batch_size: PositiveInt = 8
    """Prompts at once."""
    seed: Seed = 0
    """Seeds the choice of prompts and the sampling."""

    def conflicts(self) -> Iterator[str]:
        """Yield what does not go together, a sentence each."""
        files = [Path(name) for name in (self.output, self.markdown) if name is not None]
        if self.output is not None:
            files.append(Path(self.output).with_suffix(".yaml"))
        if len(set(files)) < len(files):
            yield (
                f"--output {self.output}: the numbers, the recommendation beside them (ending .yaml) and --markdown need names "
                "of their own."
            )
        if 0 < self.pilot.steps <= 10 or (self.pilot.steps and not self.pilot.kl_coefs):
            yield "--pilot.steps: ten of the steps are trained, so give more than 10, and one or more --pilot.kl_coefs."
        if self.sampling.num_generations < 2 or self.sampling.temperature == 0:
            yield (
                "The answers to a prompt are compared with each other: give --sampling.num_generations 2 or more and a "
                "--sampling.temperature above 0."
            )


def run(config: Config) -> None:
    """Measure, print the report and write what was asked for."""
    from cagsr.diagnosis.attacks import attack
    from cagsr.diagnosis.diagnose import diagnose, load_checker, with_truth
    from cagsr.diagnosis.diagnosis_report import as_json, as_markdown, as_yaml, finding, print_report
    from cagsr.diagnosis.signals import SignalReader, collect_signals
    from cagsr.evaluation.held_out import choose_metric
    from cagsr.models.generation import generation_notes
    from cagsr.models.load import load_model
    from cagsr.prompts.salience import DocumentFrequency
    from cagsr.reward.build import reward_warnings
    from cagsr.reward.learn_associations import FEWEST_PROMPTS, associations_of
    from cagsr.reward.learn_probe import named_probe, probe_of
    from cagsr.reward.term import SUPPORT
    from cagsr.support.atomic import write_text_atomically

    loaded = load_model(config.model, for_training=False)
    prompts, notes = read_prompts(config.data, None, config.salience, None, loaded, config.sampling.max_new_tokens)
    associations = None
    if len(prompts) >= FEWEST_PROMPTS or config.reward.associations.path is not None:
        associations = associations_of(loaded, prompts, config.sampling, config.reward.associations, seed=config.seed)
    else:
        few = f"Too few prompts to learn associations from (fewer than {FEWEST_PROMPTS}): those terms are left out."
        notes = (*notes, few)
    frequency = DocumentFrequency.fit(one.prompt for one in prompts)
    everyone = prompts
    if len(prompts) > config.num_prompts:
        prompts = random.Random(config.seed).sample(prompts, config.num_prompts)
    metric = choose_metric(None, prompts) if config.checker is None else load_checker(config.checker)
    probe = named_probe(config.reward)
    if probe is None and config.reward.needs(SUPPORT):
        probe = probe_of(loaded, everyone, frequency, config.sampling, config.reward.probe, seed=config.seed)
    scorer = answer_scorer(
        config,
        loaded,
        config.sampling.temperature,
        associations=associations,
        probe=probe,
        frequency=frequency,
        costly=True,
    )
    say(*loaded.notes, *generation_notes(loaded, config.sampling), *notes, *metric.notes)
    reader = SignalReader(loaded, scorer, config.attention)
    signals = collect_signals(reader, prompts, config.sampling, seed=config.seed, chunk=config.batch_size)
    attacked = None
    if config.attacked_prompts:
        with working("measuring answers made to fool the reward"):
            attacked = attack(reader, signals, most=config.attacked_prompts, chunk=scorer.micro_batch_size)
    if config.checker is not None or metric.name.startswith("ROUGE-L"):
        signals = with_truth(signals, metric)
    with working("weighing the terms"):
        found = diagnose(signals, scorer.weights, config.reward, attacked)
    found = dataclasses.replace(found, warnings=(*found.warnings, *reward_warnings(config.reward)))
    if config.pilot.steps and found.recommendation.weights:
        found = dataclasses.replace(found, forecasts=_forecasts(config, found, associations))
    print_report(found, signals.configured, table_console())
    say(finding(found))
    if config.output is not None:
        path = Path(config.output)
        write_text_atomically(path, as_json(found))
        recommended = path.with_suffix(".yaml")
        if found.recommendation.weights:
            write_text_atomically(recommended, as_yaml(found, config.model.path, config.attention, config.reward))
            train = f"cagsr train --config {recommended} --model {config.model.path} --data {config.data.path} --output_dir run"
            say(f"All numbers: {path}; the recommendation: {train}")
        else:
            recommended.unlink(missing_ok=True)  # an earlier one's: training by it is what is advised against
            say(f"All numbers: {path}; nothing is recommended, so there is no {recommended}.")
    if config.markdown is not None:
        write_text_atomically(Path(config.markdown), as_markdown(found, signals.configured))
        say(f"The report: {config.markdown}")


def _forecasts(config: Config, found: "Diagnosis", associations: "Associations | None") -> tuple["LeashForecast", ...]:
    """When the recommended reward begins to hurt, under each leash."""
    from cagsr.config import TrainConfig
    from cagsr.diagnosis.diagnosis_report import as_yaml
    from cagsr.parse import parse_command
    from cagsr.pilot import forecast_leashes
    from cagsr.support.atomic import write_text_atomically

    pilot = config.pilot
    with TemporaryDirectory(prefix="cagsr-pilot-") as folder:
        file, learned = Path(folder) / "recommended.yaml", Path(folder) / "associations.json"
        write_text_atomically(file, as_yaml(found, config.model.path, config.attention, config.reward))
        if associations is not None:
            write_text_atomically(learned, json.dumps(associations.to_json()))
        flags = [
            "--config",
            str(file),
            "--model",
            config.model.path,
            "--data",
            config.data.path,
            "--output_dir",
            folder,
        ]
        recommended: TrainConfig = parse_command(TrainConfig, flags, prog="train")
        reward = recommended.reward
        if associations is not None:
            kept = dataclasses.replace(reward.associations, path=str(learned))
            reward = dataclasses.replace(reward, associations=kept)
        run = dataclasses.replace(recommended.run, steps=pilot.steps, batch_size=pilot.batch_size, seed=config.seed)
        planned = dataclasses.replace(
            recommended,
            model=config.model,
            data=config.data,
            salience=config.salience,
            sampling=config.sampling,
            reward=reward,
            ppo=pilot.ppo,
            lora=pilot.lora,
            run=run,
        )
        return forecast_leashes(planned, pilot.kl_coefs)
