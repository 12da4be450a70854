"""Who samples the answers: a small interface, and the sampler that is the policy itself.

The other sampler is a vLLM server (``rollout/vllm.py``). Whoever samples, only token ids come back: log-probabilities,
values and the attention that the reward reads are the scoring pass's (``update/score.py``), so an engine needs no patch.
"""

from __future__ import annotations

from typing import Protocol

from cagsr.config import SamplingConfig
from cagsr.flow import EpisodeBatch, PromptBatch
from cagsr.models.load import LoadedModel
from cagsr.rollout.sample import sample_responses


class Sampler(Protocol):
    """Samples answers from the policy as it is now. Every process calls every method, in the same order."""

    notes: tuple[str, ...]
    """What the user should know about the sampler, one sentence each."""

    def sample(self, prompts: PromptBatch, sampling: SamplingConfig) -> EpisodeBatch:
        """Sample one answer for each row of this process's prompts.

        Args:
            prompts: ``(batch, prompt)``, the ``sampling.num_generations`` candidates of a prompt as rows in a row.
            sampling: temperature, filters, lengths and stop strings.

        Raises:
            RolloutError: an engine can't be reached, or gave what can't be used.
        """
        ...

    def policy_changed(self) -> None:
        """The policy was updated: the next answers must be the new policy's."""
        ...

    def close(self) -> None:
        """Let go of connections and files; no answers are sampled after it."""
        ...


class TransformersSampler:
    """The policy itself, through transformers' ``generate`` in this process."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self.notes: tuple[str, ...] = ()

    def sample(self, prompts: PromptBatch, sampling: SamplingConfig) -> EpisodeBatch:
        """As the protocol; every process samples for itself."""
        return sample_responses(self._loaded, prompts, sampling)

    def policy_changed(self) -> None:
        """Nothing to do: the sampler is the policy."""

    def close(self) -> None:
        """Nothing to let go of."""
