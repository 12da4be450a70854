"""Which prompts come next, by how the answers to the last ones did: groups without spread are passed over, or a bandit chooses."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from scipy.sparse import csr_array
from scipy.sparse.linalg import svds

from cagsr.config import CurriculumConfig
from cagsr.errors import ConfigError, RunError
from cagsr.flow import EncodedPrompt, Returns
from cagsr.models.sentence_encoder import load_encoder
from cagsr.prompts.references import prompt_words
from cagsr.prompts.salience import DocumentFrequency
from cagsr.prompts.stream import PromptSet, PromptStream
from cagsr.prompts.tf_idf import tf_idf
from cagsr.tasks.curriculum import Curriculum

FLAT = 1e-6
"""Rewards of a prompt's answers that differ by no more than this teach nothing: their advantages are 0."""
MEANINGS = 8
"""Dimensions that texts are reduced to before they are clustered."""
Gather = Callable[[list[Any]], list[Any]]
"""Puts the lists of all processes behind each other, in their order; each process gets the whole."""


def build_curriculum(
    config: CurriculumConfig,
    prompts: PromptSet,
    batch_size: int,
    seed: int,
    process_index: int,
    num_processes: int,
    gather: Gather,
) -> Curriculum:
    """Make the configured curriculum, which deals ``batch_size`` prompts a step to this process.

    ConfigError: a set that is streamed, or that has fewer prompts than clusters, can't be clustered.
    """
    stream = PromptStream(prompts, batch_size, seed, process_index, num_processes)
    if config.kind == "none":
        return stream
    if prompts.reopen is not None:
        raise ConfigError(
            f"--curriculum.kind {config.kind} goes back to prompts it has met; leave --data.streaming out."
        )
    if config.kind == "skip_flat":
        return SkipFlat(prompts, batch_size, seed, process_index, num_processes, gather)
    if len(prompts.prompts) < config.clusters:
        raise ConfigError(
            f"--curriculum.clusters {config.clusters}: there are {len(prompts.prompts)} prompts; ask for fewer clusters."
        )
    cluster = cluster_prompts(prompts.prompts, prompts.frequency, config, seed)
    return SelfPaced(prompts, cluster, config, batch_size, seed, process_index, num_processes, gather)


class SkipFlat:
    """Shuffled epochs, but a prompt whose answers were all worth the same is left out of the next epoch."""

    def __init__(
        self, prompts: PromptSet, batch_size: int, seed: int, process_index: int, num_processes: int, gather: Gather
    ) -> None:
        self._all, self._seed, self._gather = prompts.prompts, seed, gather
        self._size, self._first = batch_size * num_processes, process_index * batch_size
        self._own = batch_size
        self._epoch, self._position = 0, 0
        self._flat: dict[int, int] = {}  # place of a prompt -> the epoch in which its answers were all alike
        self._order = self._shuffled()
        self._dealt: list[tuple[int, int]] = []  # places of the last prompts, and the epochs they were dealt in

    @property
    def epoch(self) -> float:
        """Epochs gone through, with the share of the present one."""
        return self._epoch + self._position / len(self._order)

    def next(self) -> list[EncodedPrompt]:
        """Deal this process's next prompts."""
        self._dealt = [self._take() for _ in range(self._size)]
        return [self._all[place] for place, _ in self._dealt[self._first : self._first + self._own]]

    def observe(self, prompts: Sequence[EncodedPrompt], returns: Returns) -> None:
        """Remember which prompts' answers were all worth the same."""
        for (place, epoch), spread in zip(self._dealt, self._gather(spreads(returns, len(prompts))), strict=True):
            if spread <= FLAT:
                self._flat[place] = epoch
            else:
                self._flat.pop(place, None)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, the same in every process."""
        return {
            "seed": self._seed, "epoch": self._epoch, "position": self._position, "order": list(self._order),
            "flat": {str(place): epoch for place, epoch in self._flat.items()},
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where ``state`` stood; RunError where that was another curriculum or seed."""
        _check(state, "order", self._seed)
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._order = [int(place) for place in state["order"]]
        self._flat = {int(place): int(epoch) for place, epoch in state["flat"].items()}

    def _take(self) -> tuple[int, int]:
        if self._position == len(self._order):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._shuffled()
        self._position += 1
        return self._order[self._position - 1], self._epoch

    def _shuffled(self) -> list[int]:
        """The epoch's prompts in its order; all of them where all were flat."""
        kept = [place for place in range(len(self._all)) if self._flat.get(place) != self._epoch - 1]
        order = kept or list(range(len(self._all)))
        random.Random(f"{self._seed}/{self._epoch}").shuffle(order)
        return order


class SelfPaced:
    """A bandit over clusters of prompts (as SPaRFT, arXiv 2508.05015): most come from where the model has most to learn.

    An arm is a cluster by meaning and by how much there is to say. What a draw from it pays is the spread of the rewards within a
    prompt's answers: where all are worth the same nothing is learned, and the spread falls where the model has learned. The
    arms' values forget by ``memory``, and the next prompt is one of the arm with the largest upper confidence bound (UCB1, Auer
    et al., 2002): its value, in units of the largest, plus ``exploration * sqrt(ln N / n)``. Each arm deals its prompts in
    shuffled epochs.
    """

    def __init__(
        self,
        prompts: PromptSet,
        cluster: NDArray[np.int64],
        config: CurriculumConfig,
        batch_size: int,
        seed: int,
        process_index: int,
        num_processes: int,
        gather: Gather,
    ) -> None:
        self._all, self._config, self._seed, self._gather = prompts.prompts, config, seed, gather
        self._members = [np.flatnonzero(cluster == one).tolist() for one in sorted(set(cluster.tolist()))]
        self._size, self._first, self._own = batch_size * num_processes, process_index * batch_size, batch_size
        self._value = [0.0] * len(self._members)
        self._drawn = [0] * len(self._members)
        self._dealt: list[int] = []  # the arms of the last prompts of all processes

    @property
    def arms(self) -> list[tuple[int, int, float]]:
        """Of each arm: its prompts, how often it was drawn, its value."""
        return [
            (len(own), drawn, value) for own, drawn, value in zip(self._members, self._drawn, self._value, strict=True)
        ]

    @property
    def epoch(self) -> float:
        """How often as many prompts were dealt as there are."""
        return sum(self._drawn) / len(self._all)

    def next(self) -> list[EncodedPrompt]:
        """Deal this process's next prompts; the arms are drawn one after the other, as if each had paid what it is worth."""
        self._dealt, places = [], []
        for _ in range(self._size):
            arm = self._best()
            own = self._members[arm]
            epoch, position = divmod(self._drawn[arm], len(own))
            order = list(own)
            random.Random(f"{self._seed}/{arm}/{epoch}").shuffle(order)
            places.append(order[position])
            self._drawn[arm] += 1
            self._dealt.append(arm)
        return [self._all[place] for place in places[self._first : self._first + self._own]]

    def observe(self, prompts: Sequence[EncodedPrompt], returns: Returns) -> None:
        """Move the arms' values towards the spreads of the last answers."""
        found: dict[int, list[float]] = {}
        for arm, spread in zip(self._dealt, self._gather(spreads(returns, len(prompts))), strict=True):
            found.setdefault(arm, []).append(spread)
        for arm, own in found.items():
            mean, before = sum(own) / len(own), self._drawn[arm] - len(own)
            keep = self._config.memory if before > 0 else 0.0
            self._value[arm] = keep * self._value[arm] + (1 - keep) * mean

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, the same in every process."""
        return {"seed": self._seed, "value": list(self._value), "drawn": list(self._drawn)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where ``state`` stood; RunError where that was another curriculum or seed."""
        _check(state, "drawn", self._seed)
        if len(state["drawn"]) != len(self._members):
            raise RunError(
                f"The checkpoint's curriculum has {len(state['drawn'])} clusters, this run's {len(self._members)}: the data has "
                "changed; resume with the data the run was started with."
            )
        self._value, self._drawn = [float(one) for one in state["value"]], [int(one) for one in state["drawn"]]

    def _best(self) -> int:
        largest, total = max(*self._value, 1e-12), sum(self._drawn)

        def bound(arm: int) -> float:
            if self._drawn[arm] == 0:
                return math.inf
            more = self._config.exploration * math.sqrt(math.log(total) / self._drawn[arm])
            return self._value[arm] / largest + more

        return max(range(len(self._members)), key=bound)


def spreads(returns: Returns, prompts: int) -> list[float]:
    """The standard deviation of the rewards of each prompt's answers; a prompt's answers are behind each other."""
    return [float(one) for one in returns.total.detach().float().view(prompts, -1).std(dim=1, correction=0)]


def cluster_prompts(
    prompts: Sequence[EncodedPrompt], frequency: DocumentFrequency, config: CurriculumConfig, seed: int
) -> NDArray[np.int64]:
    """A cluster for each prompt, ``(prompts,)``, by meaning and by difficulty.

    Meaning is an embedding (``config.embedding_model``), or TF-IDF of the words, reduced to its first directions (latent semantic
    analysis); difficulty is how much there is to say, the logarithm of the summed salience. Both are brought to unit spread;
    k-means from several starts.
    """
    texts = [prompt_words(one.prompt) for one in prompts]
    if config.embedding_model is not None:
        encoder = load_encoder(config.embedding_model, "cpu")
        vectors = np.asarray(encoder.encode(texts, batch_size=64, show_progress_bar=False), dtype=np.float64)
        meaning = _reduced(csr_array(vectors), seed)
    else:
        meaning = _reduced(tf_idf(texts, frequency), seed)
    effort = np.log1p([sum(one.salience) for one in prompts])[:, None]
    features = np.hstack(
        [meaning / max(float(meaning.std()), 1e-12), (effort - effort.mean()) / max(float(effort.std()), 1e-12)]
    )
    tries = [kmeans2(features, config.clusters, minit="++", seed=seed + number, missing="warn") for number in range(5)]

    def inertia(found: tuple[Any, Any]) -> float:
        centres, labels = found
        return float(((features - centres[labels]) ** 2).sum())

    labels: NDArray[np.int64] = min(tries, key=inertia)[1].astype(np.int64)
    return labels


def _reduced(vectors: csr_array, seed: int) -> NDArray[np.float64]:
    """The first directions of some rows."""
    most = min(MEANINGS, min(vectors.shape) - 1)
    if most < 1:
        return np.zeros((vectors.shape[0], 1))
    left, singular, _ = svds(vectors, k=most, random_state=seed)
    return np.asarray(left * singular)


def _check(state: Mapping[str, Any], key: str, seed: int) -> None:
    if key not in state:
        raise RunError("The checkpoint was made with another --curriculum.kind; resume with that one.")
    if state["seed"] != seed:
        raise RunError(
            f"The checkpoint drew its prompts with seed {state['seed']}, this run with {seed}; resume with --run.seed "
            f"{state['seed']}."
        )
