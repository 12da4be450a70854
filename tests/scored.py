"""The one scorer, as tests ask it: what the policy says of answers, with or without the maps of its attention."""

from __future__ import annotations

from torch import Tensor

from cagsr.config import AttentionConfig, SamplingConfig
from cagsr.flow import EpisodeBatch, Readings
from cagsr.models.actor_critic import ActorCritic
from cagsr.models.load import LoadedModel
from cagsr.reward.micro_batch import TermVisitor
from cagsr.scoring.scorer import Scorer

PLAIN = SamplingConfig()


def scored(
    loaded: LoadedModel,
    episodes: EpisodeBatch,
    sampling: SamplingConfig = PLAIN,
    *,
    micro_batch_size: int = 8,
    actor_critic: ActorCritic | None = None,
) -> Readings:
    """The policy's readings; no attention is read."""
    return Scorer(loaded, AttentionConfig(), sampling, micro_batch_size, actor_critic=actor_critic).policy(episodes)


def scored_with_maps(
    loaded: LoadedModel,
    episodes: EpisodeBatch,
    sampling: SamplingConfig = PLAIN,
    *,
    micro_batch_size: int = 8,
    actor_critic: ActorCritic | None = None,
) -> tuple[Readings, Tensor]:
    """The same, and ``(batch, response, context)`` attention, averaged over all layers and heads."""
    scorer = Scorer(loaded, AttentionConfig(layers="all"), sampling, micro_batch_size, actor_critic=actor_critic)
    visitor = TermVisitor(episodes, [], "sum", keep_maps=True)
    readings = scorer.policy(episodes, visitor)
    attention = visitor.attention()
    assert attention is not None
    return readings, attention.maps
