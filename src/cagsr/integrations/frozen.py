"""Score texts with a frozen model loaded from a path: for loops whose reward functions run apart from the policy.

verl and OpenRLHF call a reward function in a process that has no policy: there the attention of the model that training
starts from is read, a signal that the policy can't move by moving its attention. Both hand over one answer at a time, so with
the scales of a run (``reward_from``) each term is set against its mean over that run; without, rewards are raw weighted sums.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from cagsr.config import AttentionConfig, DataConfig, ModelConfig, RewardConfig, SalienceConfig
from cagsr.errors import ConfigError, DataError
from cagsr.flow import EncodedPrompt, Prompt
from cagsr.integrations.prompts import GivenPrompt, PromptEncoder
from cagsr.models.load import load_model
from cagsr.parse import parse_command
from cagsr.prompts.load import load_rows
from cagsr.reward.answers import AnswerScorer
from cagsr.reward.learn_associations import NAME_A_FILE, named_associations
from cagsr.reward.learn_probe import named_probe
from cagsr.reward.weigh import weigh
from cagsr.runs.reward import with_run_reward
from cagsr.scoring.answers import Response, encode_response, stop_token

VARIABLE = "CAGSR_REWARD_CONFIG"
"""Environment variable with the path of the YAML file of settings."""

_one_at_a_time = threading.Lock()
"""Both loops call from several threads; the attention is read through a place that all threads share."""


@dataclass(frozen=True)
class _Data(DataConfig):
    path: str = ""
    """The prompts that are trained on: in them words are counted for IDF. Empty: none."""


@dataclass(frozen=True)
class FrozenConfig:
    """The YAML file: the same sections as for ``cagsr train``, whose other settings are left out."""

    model: ModelConfig
    data: _Data = field(default_factory=_Data)
    reward_from: str | None = None
    """Folder of a cagsr train run whose reward is used: settings, IDF table, associations and scales."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    salience: SalienceConfig = field(default_factory=SalienceConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    temperature: float = 1.0
    """Divides the logits for self-certainty, as the trainer's sampling does."""
    batch_size: int = 32
    """Answers in memory at once."""


class FrozenScorer:
    """A frozen model, the prompts that its words are counted in, and the reward.

    Raises ConfigError where without a run ``reward.normalize`` is not ``none`` or there is nothing to count words in, and for a
    setting of the data that has no effect here; ModelError, DataError, RunError where one of these can't be read.
    """

    def __init__(self, config: FrozenConfig) -> None:
        config, learned = with_run_reward(config, config.temperature)
        self.reward, self.scales = config.reward, None if learned is None else learned.scales
        if config.reward.normalize != "none" and self.scales is None:
            raise ConfigError(
                f"reward.normalize is {config.reward.normalize}, but verl and OpenRLHF hand over one answer at a time: name a "
                "cagsr train run whose scales are used with reward_from, or set reward.normalize: none and let their "
                "estimator (grpo, rloo) scale."
            )
        if config.salience.weighting == "idf" and not config.data.path and learned is None:
            raise ConfigError(
                "salience.weighting idf counts words in the prompts: name them with data.path (or a run with reward_from), "
                "or set salience.weighting: uniform."
            )
        for name in ("system_prompt", "split_text"):
            if getattr(config.data, name) != getattr(_Data(), name):
                raise ConfigError(
                    f"data.{name} is a setting of cagsr train: verl and OpenRLHF make their prompts themselves, so leave "
                    "it out and set it there."
                )
        if self.reward.agreement.weight != 0:
            raise ConfigError(
                "reward.agreement compares the answers to a prompt, and verl and OpenRLHF hand over one answer at a time: set its "
                "weight to 0."
            )
        self.loaded = load_model(config.model, for_training=False)
        self.encoder = PromptEncoder(
            self.loaded.tokenizer,
            config.salience,
            source=config.data.path or "prompts",
            frequency=None if learned is None else learned.frequency,
        )
        self.known: dict[str, Prompt] = {}
        """The prompts of ``data`` by the text that the model reads; texts also as what the chat template makes of them."""
        if config.data.path:
            self.known = self.encoder.fit(_prompts(config.data))
            if self.loaded.tokenizer.chat_template is not None:
                # Loops that only know text make a user's message of it.
                texts = [one for one in self.known.values() if one.messages is None]
                chats = [self.encoder.render([{"role": "user", "content": one.text}], one.row) for one in texts]
                self.known |= {one.text: one for one in chats}
        self.scorer = AnswerScorer(
            self.loaded,
            config.reward,
            config.attention,
            config.salience,
            temperature=config.temperature,
            micro_batch_size=config.batch_size,
            associations=named_associations(config.reward, NAME_A_FILE),
            probe=named_probe(config.reward),
            frequency=self.encoder.frequency,
            every=False,
        )

    def terms(
        self, prompts: Sequence[EncodedPrompt], responses: Sequence[Response]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The reward, ``(answers,)`` float32, and the raw terms behind it; may be called from several threads.

        An answer's reward does not depend on what is handed over with it. Raises RewardError where a term fails.
        """
        with _one_at_a_time:
            raw = self.scorer.raw_values(prompts, responses)
        weighed = weigh(raw, self.scorer.weights, self.reward, torch.arange(len(responses)), self.scales)
        return weighed.total.float(), raw

    def response(self, prompt: EncodedPrompt, text: str) -> Response:
        """An answer of which only the text is known: tokenised anew, and taken as one that ended by itself."""
        response = encode_response(self.loaded, prompt, text)
        # An answer of no text is one that stopped at once.
        return response if response.ids else Response(text, (stop_token(self.loaded, prompt),), True)


@lru_cache(maxsize=4)
def _scorer(path: str) -> FrozenScorer:
    return FrozenScorer(parse_command(FrozenConfig, ["--config", path], prog="cagsr.integrations"))


def frozen_scorer(path: str | None = None) -> FrozenScorer:
    """The scorer of a YAML file (see :class:`FrozenConfig`), loaded at the first call and kept.

    Without ``path`` it is the file that ``CAGSR_REWARD_CONFIG`` names. Raises ConfigError where it can't be used.
    """
    path = path or os.environ.get(VARIABLE)
    if not path:
        raise ConfigError(f"No settings for the attention reward: put the path of a YAML file in {VARIABLE}.")
    with _one_at_a_time:
        return _scorer(path)


def _prompts(data: DataConfig) -> Iterator[GivenPrompt]:
    for row in load_rows(data):
        if not row.values.get(data.prompt_column):
            raise DataError(
                f"{row.source}, row {row.number}: no prompt in the column '{data.prompt_column}'; name another with "
                "data.prompt_column."
            )
        yield row.values[data.prompt_column]
