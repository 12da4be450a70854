"""``cagsr calibrate``: the reward's weights from a few judgements."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import Gt

from cagsr.commands import inputs
from cagsr.config import AttentionConfig, DataConfig, ModelConfig, RewardConfig, SalienceConfig, SamplingConfig
from cagsr.config.ranges import OutputFile, PositiveInt, Seed
from cagsr.errors import ConfigError, DataError
from cagsr.support.progress import say


@dataclass(frozen=True)
class Config:
    """Fit the weights of the reward's terms to preference pairs, drawn towards the weights that it has without them."""

    model: ModelConfig
    data: DataConfig
    """Preference pairs, as cagsr rate export writes them."""
    chosen_column: str = "chosen"
    """Column with the better answer."""
    rejected_column: str = "rejected"
    """Column with the worse answer."""
    eval_data: str | None = None
    """Other pairs to judge the weights by; None: the same ones, by weights that saw none of their prompt."""
    num_pairs: PositiveInt | None = None
    """Fit to so many pairs, drawn by the seed; None: all."""
    shrinkage: Annotated[float, Gt(0)] = 30.0
    """How many judgements the weights of the reward count as, about: more trusts them more."""
    output: OutputFile | None = None
    """YAML file for cagsr train --config."""
    scale_prompts: PositiveInt = 64
    """Answers are sampled to so many of the prompts, for the terms' scales."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    salience: SalienceConfig = field(default_factory=SalienceConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    batch_size: PositiveInt = 32
    """Answers at once."""
    seed: Seed = 0
    """Seeds the choice of pairs and prompts and the sampling."""

    def conflicts(self) -> Iterator[str]:
        """Yield what does not go together, a sentence each."""
        if self.sampling.num_generations < 2 or self.sampling.temperature == 0:
            yield (
                "The terms' scales are deviations among the answers to a prompt: give --sampling.num_generations 2 or more and "
                "a --sampling.temperature above 0."
            )
        if self.reward.normalize != "within_prompt":
            yield "--reward.normalize: weights are fitted for within_prompt; leave it at that."


def run(config: Config) -> None:
    """Fit, say how well the weights agree with people before and after, and write them."""
    import random

    import numpy as np
    import yaml

    from cagsr.evaluation.intervals import mean_interval, paired_difference
    from cagsr.models.load import load_model
    from cagsr.parse import differing
    from cagsr.preferences.calibrate import agreement, as_strong_as, calibrated, cross_fitted
    from cagsr.preferences.pairs import subset
    from cagsr.preferences.term_differences import pair_differences, term_scales
    from cagsr.prompts.salience import DocumentFrequency
    from cagsr.reward.learn_associations import FEWEST_PROMPTS, associations_of
    from cagsr.reward.learn_probe import named_probe
    from cagsr.support.atomic import write_text_atomically
    from cagsr.support.tables import rich_table

    loaded = load_model(config.model, for_training=False)
    columns = (config.chosen_column, config.rejected_column)
    pairs, notes = inputs.read_prompts(config.data, None, config.salience, None, loaded, 0, columns)
    pairs = subset(pairs, config.num_pairs, config.seed)
    prompts = list({one.ids: one for one in pairs}.values())
    if len(prompts) < 2:
        raise DataError(f"{config.data.path}: {len(prompts)} prompt; weights take judgements of two prompts or more.")
    frequency = DocumentFrequency.fit(one.prompt for one in prompts)
    associations = None
    if config.reward.associations.path is not None or len(prompts) >= FEWEST_PROMPTS:
        associations = associations_of(loaded, prompts, config.sampling, config.reward.associations, seed=config.seed)
    elif config.reward.needs("associations"):
        raise ConfigError(
            f"The reward needs associations, and {len(prompts)} prompts are too few to learn them from: name the file of a "
            "training run with --reward.associations.path RUN/associations.json."
        )
    scorer = inputs.answer_scorer(
        config,
        loaded,
        config.sampling.temperature,
        micro_batch_size=config.batch_size,
        associations=associations,
        probe=named_probe(config.reward),
        frequency=frequency,
    )
    say(*loaded.notes, *notes)
    drawn = random.Random(config.seed).sample(prompts, min(len(prompts), config.scale_prompts))
    scales = term_scales(scorer, drawn, config.sampling, config.seed)
    fitted_to = pair_differences(scorer, scales, pairs, columns)
    prior = np.array([scorer.weights[name] for name in scales.names])
    weights = calibrated(fitted_to.differences, prior, config.shrinkage)
    if config.eval_data is None:
        judged, what = fitted_to, f"{len(pairs):,} pairs, each by weights that saw none of its prompt"
        after = cross_fitted(judged.differences, prior, config.shrinkage, judged.prompts)
    else:
        other = dataclasses.replace(config.data, path=config.eval_data)
        held_out, _ = inputs.read_prompts(other, None, config.salience, frequency, loaded, 0, columns)
        judged, what = pair_differences(scorer, scales, held_out, columns), f"{len(held_out):,} other pairs"
        after = judged.differences @ weights
    before, now = agreement(judged.differences @ prior), agreement(after)
    final = as_strong_as(weights, prior, scales.answers)
    rows = [[name, f"{old:+.2f}", f"{new:+.2f}"] for name, old, new in zip(scales.names, prior, final, strict=True)]
    inputs.table_console().print(rich_table("Weights, within_prompt", ["term", "before", "calibrated"], rows))
    say(
        f"Agreement with {what}: {mean_interval(before)} before, {mean_interval(now)} calibrated, difference "
        f"{paired_difference(now, before):+.3f}."
    )
    if config.output is not None:
        chosen = {
            name: dataclasses.replace(getattr(config.reward, name), weight=round(float(weight), 4))
            for name, weight in zip(scales.names, final, strict=True)
        }
        sections = {
            "attention": differing(config.attention, AttentionConfig()),
            "salience": differing(config.salience, SalienceConfig()),
            "reward": differing(dataclasses.replace(config.reward, **chosen), RewardConfig()),
        }
        kept = {name: section for name, section in sections.items() if section}
        comment = (
            f"# What cagsr calibrate makes of {len(pairs)} judgements in {config.data.path}, for {config.model.path}.\n"
        )
        write_text_atomically(Path(config.output), comment + yaml.safe_dump(kept, sort_keys=False))
        say(f"{config.output}: cagsr train --config {config.output} takes these weights.")
