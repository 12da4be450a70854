"""The reward: each term normalised, weighted, summed, and paid at the tokens it belongs to."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cagsr.errors import CagsrError, ConfigError, RewardError
from cagsr.flow import Returns, RewardBatch
from cagsr.reward.normalize import Normalization, Normalizer, Reduce
from cagsr.reward.pooling import add_at_last_token
from cagsr.reward.term import RewardTerm
from cagsr.reward.turns import Exchanges
from cagsr.reward.values import RawValues, TermValues, term_values


class RewardFunction:
    """A weighted sum of terms, each brought to one scale by its running moments over the run; of weight 0: watched alone."""

    def __init__(
        self,
        terms: Sequence[RewardTerm],
        weights: Sequence[float],
        normalize: Normalization,
        clip: float = 5.0,
        reduce: Reduce | None = None,
    ) -> None:
        """Bind the terms, each with a name and a weight of its own (else ConfigError); the rest as :class:`Normalizer`."""
        if not any(weights):
            raise ConfigError("the reward has no term: give at least one term a weight other than 0")
        if len(terms) != len(weights):
            raise ConfigError(f"the reward has {len(terms)} terms but {len(weights)} weights: give one for each term")
        self.names = tuple(term.name for term in terms)
        twice = {name for name in self.names if self.names.count(name) > 1}
        if twice:
            raise ConfigError(f"two reward terms are called {sorted(twice)[0]!r}: give each a name of its own")
        self.terms = tuple(terms)
        self.paid = {name: float(weight) for name, weight in zip(self.names, weights, strict=True) if weight}
        """The weight of each term that has one."""
        self.normalizer = Normalizer(list(self.paid), normalize, clip, reduce)

    def __call__(
        self,
        batch: RewardBatch,
        known: Mapping[str, RawValues | CagsrError] | None = None,
        *,
        update: bool = True,
    ) -> Returns:
        """Compute the reward of a batch.

        ``known`` is what terms have given (or how they failed) while the attention was read (``TermVisitor.values``).
        ``update`` takes the batch into the running moments first (training); False leaves them as they are and exchanges
        nothing between processes (evaluation). Before the first update every term counts 0.

        A term without variance contributes 0; where a term does not apply to an answer its raw value is NaN and it
        contributes 0. Rows of ``per_token`` sum to ``total``, except that an answer without tokens is paid nothing on
        tokens. Of several turns each answer is judged among the answers of that turn to its prompt; one that came there
        alone is neither better nor worse. A term of whole episodes (``by_episode``) compares them whatever their turns.

        Raises RewardError: a term fails or gives a number that is not finite (the moments are then unchanged); ConfigError:
        ``within_prompt`` and no prompt has two answers.
        """
        exchanges = Exchanges.of(batch)
        mask, group = exchanges.batch.episodes.sampled, exchanges.group
        if self.normalizer.normalize == "within_prompt" and len(torch.unique(group)) == len(group):
            raise ConfigError(
                "reward.normalize within_prompt compares the answers to one prompt and there is one answer each: "
                "use --reward.normalize running, or sample more with --sampling.num_generations"
            )
        values = self._values(exchanges, known or {}, update)
        groups = {term.name: exchanges.group_of(term) for term in self.terms if term.name in self.paid}
        if update:
            self.normalizer.update({name: values[name] for name in groups}, list(groups.values()))
        total = torch.zeros(mask.shape[0], dtype=torch.float32, device=mask.device)
        per_token = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        contributions: dict[str, Tensor] = {}
        for name, weight in self.paid.items():
            term, compared = values[name], groups[name]
            amount, scale = self.normalizer(name, term, compared), self.normalizer.scale(name)
            if self.normalizer.normalize == "within_prompt" and compared is group:
                amount = amount.masked_fill(exchanges.alone, 0.0)
            # Dense gains keep their place, scaled; the centring and the clipping of the sum fall on the last token.
            tokens = torch.zeros_like(per_token) if term.tokens is None else term.tokens * scale
            tokens = add_at_last_token(tokens, amount - tokens.sum(dim=1), mask)
            contributions[name] = weight * amount
            total = total + contributions[name]
            per_token = per_token + weight * tokens
        raw = {name: value.raw for name, value in values.items()}
        return exchanges.folded(total, per_token, raw, contributions)

    def _values(
        self, exchanges: Exchanges, known: Mapping[str, RawValues | CagsrError], update: bool
    ) -> dict[str, TermValues]:
        failure: CagsrError | None = None
        values: dict[str, TermValues] = {}
        try:
            for term in self.terms:
                values[term.name] = term_values(term, exchanges.seen_by(term), known.get(term.name))
        except CagsrError as error:
            failure = error
        # All processes learn of a failure together: one that raised alone would leave the others waiting for ever.
        failed = torch.tensor([float(failure is not None)])
        if update and float(self.normalizer.summed(failed, exchanges.batch.episodes.ids.device)) > 0:
            failure = failure or RewardError("a reward term failed on another process: its message names the term")
        if failure is not None:
            raise failure
        return values

    def state_dict(self) -> dict[str, dict[str, float]]:
        """The running moments, see :meth:`Normalizer.state_dict`."""
        return self.normalizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over running moments, see :meth:`Normalizer.load_state_dict`."""
        self.normalizer.load_state_dict(state)
