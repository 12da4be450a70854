"""Agreement: do the model's other answers to the prompt say the same?

Of answers that end at a result the one that most end at (TTRL, arXiv 2504.16084); of free text, how many mean the same (EMPO,
arXiv 2504.05812). The model is its own judge: where it is mostly wrong, agreement pays for the mistake.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cagsr.config.ranges import PositiveShare
from cagsr.flow import Prompt, RewardBatch
from cagsr.models.sentence_encoder import Encoder, load_encoder
from cagsr.prompts.salience import DocumentFrequency
from cagsr.prompts.tf_idf import tf_idf
from cagsr.reward.registry import TermConfig, register
from cagsr.reward.term import PartialValues
from cagsr.reward.turns import is_last
from cagsr.tasks.final_answer import final_answer, same_answer

if TYPE_CHECKING:
    from cagsr.reward.settings import RewardConfig


@dataclass(frozen=True)
class AgreementConfig(TermConfig):
    """Agreement: whether the other answers to the prompt end at the same result, or mean the same."""

    by: Literal["final_answer", "meaning"] = "final_answer"
    """final_answer: the result that an answer ends at; meaning: clusters of whole answers."""
    pays: Literal["majority", "share"] = "majority"
    """majority: 1 for the answers of the largest cluster; share: the share of the other answers in the same cluster."""
    embedding_model: str | None = None
    """meaning: sentence-transformers model (pip install cagsr[embeddings]); None: the words, by TF-IDF."""
    similarity: PositiveShare = 0.8
    """meaning: mean cosine from which two clusters are one."""


@register
@dataclass(frozen=True)
class Agreement:
    """Agreement, :func:`agreement`; of steps and conversations the last answers'."""

    name: ClassVar[str] = "agreement"
    needs: ClassVar[frozenset[str]] = frozenset()
    place: ClassVar[int] = 16
    by_group: ClassVar[bool] = True
    by_episode: ClassVar[bool] = True
    settings: AgreementConfig

    def __post_init__(self) -> None:
        _ = self.encoder  # what can't be loaded is told before the run begins

    @cached_property
    def encoder(self) -> Encoder | None:
        """What makes vectors of texts."""
        path = self.settings.embedding_model
        return None if path is None else load_encoder(path, "cpu", "--reward.agreement.embedding_model")

    def __call__(self, batch: RewardBatch) -> PartialValues:
        """Return ``(batch,)`` in [0, 1]; it does not apply to the only answer to a prompt."""
        episodes = batch.episodes
        last, group = is_last(episodes), episodes.prompts.group
        values, applies = torch.zeros(len(group)), torch.zeros(len(group), dtype=torch.bool)
        for number in torch.unique(group[last]).tolist():
            rows = ((group == number) & last).nonzero().flatten().tolist()
            if len(rows) > 1:
                values[rows] = agreement(self.clusters([episodes.completions[row] for row in rows]), self.settings.pays)
                applies[rows] = True
        return PartialValues(values.to(group.device), applies.to(group.device))

    def clusters(self, texts: Sequence[str]) -> list[int | None]:
        """The cluster of each of some answers to one prompt, None for one without a result."""
        if self.settings.by == "final_answer":
            return same_results([final_answer(text) for text in texts])
        if self.encoder is None:
            # Words that all of these answers say tell none from another.
            vectors = tf_idf(texts, DocumentFrequency.fit([Prompt(0, text) for text in texts])).toarray()
        else:
            vectors = np.asarray(self.encoder.encode(list(texts), batch_size=64, show_progress_bar=False))
        return list(same_meanings(vectors, self.settings.similarity))

    @staticmethod
    def advice(settings: AgreementConfig, reward: RewardConfig) -> Iterator[str]:
        """It sharpens."""
        if settings.weight > 0:
            yield "agreement pays for being of one mind, right or wrong: watch the entropy, and a checker that it can't see."


def same_results(results: Sequence[str | None]) -> list[int | None]:
    """Number results so that equal ones (:func:`cagsr.tasks.final_answer.same_answer`) have the same number; None stays."""
    kinds: list[str] = []
    found: list[int | None] = []
    for result in results:
        if result is None:
            found.append(None)
            continue
        number = next((place for place, kind in enumerate(kinds) if same_answer(kind, result)), len(kinds))
        if number == len(kinds):
            kinds.append(result)
        found.append(number)
    return found


def same_meanings(vectors: NDArray[np.float64], similarity: float) -> list[int]:
    """Cluster vectors ``(n, width)``, n >= 2, by average linkage; clusters at a mean cosine of ``similarity`` are one.

    A vector of zeros (a text without a word) is like no other.
    """
    from scipy.cluster.hierarchy import fcluster, linkage  # nobody else waits for them

    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = (vectors / np.where(lengths > 0, lengths, 1.0)) @ (vectors / np.where(lengths > 0, lengths, 1.0)).T
    above = np.triu_indices(len(vectors), 1)
    distance = np.clip(1.0 - cosine[above], 0.0, 2.0)
    # A hair more, so that equal texts are one at a similarity of 1.
    labels = fcluster(linkage(distance, "average"), 1.0 - similarity + 1e-9, "distance")
    return [int(one) for one in labels]


def agreement(clusters: Sequence[int | None], pays: Literal["majority", "share"]) -> Tensor:
    """What answers in these clusters are paid, ``(n,)`` float32, n >= 2.

    ``share``: the share of the *other* answers in the same cluster. ``majority``: 1 in the largest cluster, in each of several
    as large, 0 for all where no two agree. An answer in no cluster (None) gets 0.
    """
    sizes = [0 if one is None else sum(other == one for other in clusters) for one in clusters]
    if pays == "share":
        return torch.tensor([max(size - 1, 0) / (len(clusters) - 1) for size in sizes])
    largest = max(sizes)
    return torch.tensor([float(size == largest and size > 1) for size in sizes])
