"""Every reward term for finished answers outside a training run: for files, for pages, for other loops' trainers.

The same passes, terms and salience as in training; raw values, which are brought to one scale once all of them are known
(``reward/weigh.py``).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cagsr.config import AttentionConfig, RewardConfig, SalienceConfig, SamplingConfig
from cagsr.config.validation import validate
from cagsr.errors import CagsrError, ConfigError
from cagsr.flow import EncodedPrompt, EpisodeBatch, Readings, RewardBatch, Trainer
from cagsr.models.load import LoadedModel
from cagsr.prompts.salience import DocumentFrequency
from cagsr.reward.association import Associations
from cagsr.reward.build import weighted_terms
from cagsr.reward.learn_probe import Probe
from cagsr.reward.micro_batch import TermVisitor
from cagsr.reward.registry import COSTLY, COUNTED
from cagsr.reward.resources import resources_of
from cagsr.reward.settings import TERMS
from cagsr.reward.term import SUPPORT, RewardTerm, by_group, needs_of
from cagsr.reward.values import RawValues, term_values
from cagsr.scoring.answers import Response, answered
from cagsr.scoring.scorer import FrozenModel, Scorer, evaluating


class AnswerScorer:
    """Reads what the reward looks at from one pass over prompt + answer, and asks every term.

    The model is left as it was: training flags, gradients, adapters; its weights are read at each call. ``attention`` says
    which layers and heads are read and, with ``source``, whose: the model's own or that of ``reference``, a frozen model
    (None: the model is its own). ``salience`` says how the pieces of a word are pooled; ``temperature`` divides the logits,
    as in sampling; ``micro_batch_size`` answers are in memory at once. Without ``associations`` the terms that read them
    are left out, whatever their weights; without ``frequency``, the prompts' word counts, or ``probe`` those that have none.
    ``every``: registered terms of weight 0 too; ``costly``: of these also such as read the answers anew.

    Raises ConfigError: a reward (without associations: what is left of it) or a choice of layers that can't be used, a term that
    counts words and no ``frequency``, one that asks the probe and no ``probe``;
    AttentionError: the model's attention can't be read.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        reward: RewardConfig,
        attention: AttentionConfig,
        salience: SalienceConfig,
        *,
        temperature: float = 1.0,
        micro_batch_size: int = 32,
        associations: Associations | None = None,
        frequency: DocumentFrequency | None = None,
        probe: Probe | None = None,
        reference: FrozenModel | None = None,
        every: bool = True,
        costly: bool = False,
    ) -> None:
        if frequency is None and (
            asking := [one.name for one in TERMS if COUNTED & one.needs and reward.asks(one.name)]
        ):
            raise ConfigError(
                f"--reward.{asking[0]}: it counts words in a set of prompts, and none is known here; name the prompts, or a run "
                "that has counted them."
            )
        if probe is None and reward.needs(SUPPORT):
            raise ConfigError(
                "The reward asks the grounding probe: no probe is known here, and no answers are sampled to learn it from; name "
                "the grounding_probe.json of a cagsr train run with --reward.probe.path."
            )
        if associations is None:
            lacking = [term.name for term in TERMS if "associations" in term.needs]
            reward = replace(reward, **{name: replace(getattr(reward, name), weight=0.0) for name in lacking})
            reward = replace(reward, watched=[name for name in reward.watched if name not in lacking])
        validate(reward, "reward.")
        self.loaded = loaded
        self.config = reward
        self.salience = salience
        self.micro_batch_size = micro_batch_size
        sampling = SamplingConfig(temperature=temperature or 1.0)
        self.scorer = Scorer(
            loaded,
            attention,
            sampling,
            micro_batch_size,
            reference=reference,
            probe=None if probe is None else probe.layer,
        )
        everything = resources_of(loaded, associations, frequency, temperature or 1.0)
        left_out = () if costly else [name for name in COSTLY if not reward.needs(name)]
        resources = replace(everything, **dict.fromkeys(left_out))
        found = weighted_terms(reward, loaded.device, resources, every=every)
        if probe is None:
            found = [(term, weight) for term, weight in found if SUPPORT not in needs_of(term)]
        self.terms: tuple[RewardTerm, ...] = tuple(term for term, _ in found)
        self.weights: dict[str, float] = {term.name: float(weight) for term, weight in found}

    def batch(self, episodes: EpisodeBatch) -> RewardBatch:
        """Everything that terms look at, attention maps included."""
        return self._read(episodes, None, keep_maps=True)[0]

    def values(self, batch: RewardBatch) -> dict[str, Tensor]:
        """Give every term's raw values, name -> ``(batch,)`` float32 on the CPU, NaN where a term does not apply.

        RewardError where a term fails or gives a number that is not finite.
        """
        return {term.name: term_values(term, batch).raw.cpu() for term in self.terms}

    def score_texts(
        self, prompts: Sequence[EncodedPrompt], responses: Sequence[Response]
    ) -> Iterator[tuple[RewardBatch, dict[str, Tensor]]]:
        """Score answers in their order, ``micro_batch_size`` at a time: what the terms saw and what they gave."""
        compared = self._compared(prompts, responses, None)
        for start in range(0, len(prompts), self.micro_batch_size):
            part = slice(start, start + self.micro_batch_size)
            batch = self.batch(answered(self.loaded, prompts[part], responses[part]))
            yield batch, self.values(batch) | {name: values[part] for name, values in compared.items()}

    def raw_values(
        self, prompts: Sequence[EncodedPrompt], responses: Sequence[Response], trainer: Trainer | None = None
    ) -> dict[str, Tensor]:
        """As ``values``, of answers micro-batch by micro-batch; DataError for an answer without a token.

        ``trainer`` is what TRL's reward functions may ask; None: nothing is trained.
        """
        compared = self._compared(prompts, responses, trainer)
        alone = [term for term in self.terms if term.name not in compared]
        found: dict[str, list[Tensor]] = {term.name: [] for term in alone}
        for start in range(0, len(prompts), self.micro_batch_size):
            part = slice(start, start + self.micro_batch_size)
            batch, known = self._read(answered(self.loaded, prompts[part], responses[part]), trainer)
            for term in alone:
                found[term.name].append(term_values(term, batch, known.get(term.name)).raw.cpu())
        joined = {name: torch.cat(values) if values else torch.zeros(0) for name, values in found.items()}
        return {term.name: {**joined, **compared}[term.name] for term in self.terms}

    def _compared(
        self, prompts: Sequence[EncodedPrompt], responses: Sequence[Response], trainer: Trainer | None
    ) -> dict[str, Tensor]:
        """The values of terms that compare the answers to a prompt: asked once of all answers, wherever they stand."""
        terms = [term for term in self.terms if by_group(term)]
        if not terms or not prompts:
            return {}
        episodes = answered(self.loaded, prompts, responses)
        numbers: dict[tuple[int, ...], int] = {}
        group = [numbers.setdefault(one.ids, len(numbers)) for one in prompts]
        asked = replace(episodes.prompts, group=torch.tensor(group, device=episodes.ids.device))
        unread = torch.zeros(episodes.ids.shape, device=episodes.ids.device)
        readings = Readings(unread, unread, unread, unread)
        batch = RewardBatch(replace(episodes, prompts=asked), readings, None, None, trainer)
        return {term.name: term_values(term, batch).raw.cpu() for term in terms}

    def _read(
        self, episodes: EpisodeBatch, trainer: Trainer | None, *, keep_maps: bool = False
    ) -> tuple[RewardBatch, Mapping[str, RawValues | CagsrError]]:
        visitor = TermVisitor(episodes, self.terms, self.salience.pooling, keep_maps=keep_maps)
        with evaluating(self.loaded.model):
            readings, reference = self.scorer.read(episodes, visitor if visitor.wants_attention else None)
        return RewardBatch(episodes, readings, reference, visitor.attention(), trainer), visitor.values
