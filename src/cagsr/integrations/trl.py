"""The attention reward as a reward function of TRL's ``GRPOTrainer`` and ``RLOOTrainer``, bound to the trainer's policy.

::

    reward = AttentionReward()
    trainer = GRPOTrainer(model, reward_funcs=reward, args=args, train_dataset=dataset)
    reward.bind(trainer)
    trainer.train()
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cagsr.config import AttentionConfig, RewardConfig, SalienceConfig, validate
from cagsr.errors import CagsrError, ConfigError, DataError, RewardError
from cagsr.flow import EncodedPrompt
from cagsr.integrations.prompts import GivenPrompt, PromptEncoder
from cagsr.models.architecture import architecture_of
from cagsr.models.load import LoadedModel
from cagsr.models.reference import Reference
from cagsr.models.stops import stop_tokens
from cagsr.prompts.render import text_of
from cagsr.reward.answers import AnswerScorer
from cagsr.reward.learn_associations import NAME_A_FILE, named_associations
from cagsr.reward.learn_probe import named_probe
from cagsr.reward.normalize import Normalizer
from cagsr.reward.trainer_calls import TrainerCalls
from cagsr.reward.values import TermValues
from cagsr.reward.weigh import contributions
from cagsr.scoring.answers import Response
from cagsr.scoring.scorer import FrozenModel

STATE_KEY = "cagsr_attention_reward"
"""Under which the running scale lies in a checkpoint's ``trainer_state.json``."""


class AttentionReward:
    """The attention reward, computed from the attention of the policy that TRL trains (or of the model it started from).

    In training each term is centred within its prompt's answers and divided by its running standard deviation
    (``reward.normalize`` ``within_prompt``, the default), as in ``cagsr train``, so that weights mean the same; answers to one
    prompt may be spread over processes. Its price: the mean that TRL logs as ``rewards/attention_reward/mean`` is 0 by
    construction; the raw terms are logged as ``attention_reward/<term>``. With ``normalize="none"``, and in evaluation, the
    rewards are raw weighted sums.

    Args:
        reward: terms and weights; ``functions`` get the row's other columns.
        attention: which layers and heads, and whose: ``source`` ``policy`` or ``reference`` (one more forward).
        salience: which words of a prompt matter; not ``spans``.
        prompts: the prompts in which words are counted for IDF; None: those of the trainer's training set.
        micro_batch_size: answers in memory at once.
        name: what TRL logs it under.
    """

    def __init__(
        self,
        reward: RewardConfig | None = None,
        attention: AttentionConfig | None = None,
        salience: SalienceConfig | None = None,
        *,
        prompts: Sequence[GivenPrompt] | None = None,
        micro_batch_size: int = 32,
        name: str = "attention_reward",
    ) -> None:
        self.reward = reward or RewardConfig()
        self.attention = attention or AttentionConfig()
        self.salience = salience or SalienceConfig()
        validate(self.reward, "reward.")
        self.__name__ = name
        self._prompts = prompts
        self._micro_batch_size = micro_batch_size
        self._trainer: Any = None

    def bind(self, trainer: Any) -> AttentionReward:
        """Take policy, tokenizer and prompts from a ``GRPOTrainer`` or ``RLOOTrainer``; call it once, before ``train()``.

        The model may be wrapped by peft and accelerate. The moments of the running scale are kept in the trainer's
        checkpoints and taken up again on resuming. Raises ConfigError for weights sharded over processes, tools or
        environments, training that has begun, or a streamed training set without ``prompts``; DataError, by its row, for a
        prompt that can't be used; ModelError where the model's attention can't be read, or the tokenizer has no offsets.
        """
        _refuse(trainer)
        tokenizer = trainer.processing_class
        encoder = PromptEncoder(
            tokenizer,
            self.salience,
            source="the trainer's prompts",
            columns={"chat_template_kwargs": dict(trainer.chat_template_kwargs)},
        )
        prompts = self._prompts if self._prompts is not None else _training_prompts(trainer, self.salience)
        if prompts is not None:
            encoder.fit(prompts)
        loaded = _loaded(trainer)
        self._scorer = AnswerScorer(
            loaded,
            self.reward,
            self.attention,
            self.salience,
            temperature=float(trainer.args.temperature),
            micro_batch_size=self._micro_batch_size,
            associations=named_associations(self.reward, NAME_A_FILE),
            probe=named_probe(self.reward),
            frequency=encoder.frequency,
            reference=_reference(trainer, loaded) if self.attention.source == "reference" else None,
            every=False,
        )
        self._encoder = encoder
        self._normalizer = Normalizer(list(self._scorer.weights), self.reward.normalize, self.reward.clip)
        self._trainer = trainer
        trainer.add_callback(_KeepScale(self._normalizer))
        return self

    def __call__(
        self,
        prompts: Sequence[GivenPrompt],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        **kwargs: Any,
    ) -> list[float | None]:
        """Score answers, with TRL's own signature: one number for each, None for an answer without a token.

        The sampled tokens are scored, not the texts; ``kwargs`` are the data's columns as lists and what else TRL gives.
        Raises ConfigError where ``bind`` was not called; RewardError or DataError, on every process if on one, where a term fails
        or a prompt can't be used.
        """
        if self._trainer is None:
            raise ConfigError("AttentionReward has no policy yet: call reward.bind(trainer) before trainer.train().")
        calls = TrainerCalls(kwargs.get("trainer_state", self._trainer.state))
        everywhere, group, own = self._raw_on_every_process(prompts, completions, completion_ids, kwargs, calls)
        if (log := kwargs.get("log_metric")) is not None:
            for name, logged in calls.metrics.items():
                for value in logged:
                    log(name, value)
            for name, values in everywhere.items():
                known = values[torch.isfinite(values)]
                if len(known):
                    log(f"{self.__name__}/{name}", float(known.mean()))
        if (log_extra := kwargs.get("log_extra")) is not None:
            for column, logged in calls.extra.items():
                each = iter(logged)
                log_extra(column, [next(each) if len(ids) else None for ids in completion_ids])
        normalizer = Normalizer(list(self._scorer.weights), "none")
        if self._trainer.model.training and len(group):
            normalizer = self._normalizer
            normalizer.update({name: TermValues.of(values) for name, values in everywhere.items()}, group)
        parts = contributions(everywhere, self._scorer.weights, normalizer, group)
        rewards = iter(torch.stack(list(parts.values())).sum(dim=0)[own].tolist())
        return [next(rewards) if len(ids) else None for ids in completion_ids]

    def _raw_on_every_process(
        self,
        prompts: Sequence[GivenPrompt],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Any],
        calls: TrainerCalls,
    ) -> tuple[dict[str, Tensor], Tensor, slice]:
        """Raw values of all processes, name -> ``(answers,)``, the prompt of each, and which answers are this process's."""
        keys: list[str] = []
        raw: dict[str, list[float]] = {}
        failure: CagsrError | None = None
        try:
            answered = [row for row, ids in enumerate(completion_ids) if len(ids)]
            encoded = [self._encoded(prompts[row], row, columns, len(prompts)) for row in answered]
            stops = self._scorer.loaded.stop_ids
            tokens = [tuple(map(int, completion_ids[row])) for row in answered]
            responses = [
                Response(text_of(completions[row]), ids, ids[-1] in stops)
                for row, ids in zip(answered, tokens, strict=True)
            ]
            found = self._scorer.raw_values(encoded, responses, calls)
            for column, logged in calls.extra.items():
                if len(logged) != len(answered):
                    raise RewardError(
                        f"log_extra({column!r}) was called for some of the answers only: call it each time"
                    )
            keys = [PromptEncoder.key(prompts[row]) for row in answered]
            raw = {name: values.tolist() for name, values in found.items()}
        except CagsrError as error:
            failure = error
        # All processes learn of a failure together: one that raised alone would leave the others waiting for ever.
        parts = gather_object([(keys, raw, None if failure is None else str(failure))])
        if failure is not None:
            raise failure
        for _, _, message in parts:
            if message is not None:
                raise RewardError(f"the attention reward failed on another process: {message}")
        numbers = {key: number for number, key in enumerate(dict.fromkeys(key for part in parts for key in part[0]))}
        group = torch.tensor([numbers[key] for part in parts for key in part[0]], dtype=torch.int64)
        everywhere = {
            name: torch.tensor([value for part in parts for value in part[1][name]], dtype=torch.float32)
            for name in self._scorer.weights
        }
        before = sum(len(part[0]) for part in parts[: self._trainer.accelerator.process_index])
        return everywhere, group, slice(before, before + len(keys))

    def _encoded(self, prompt: GivenPrompt, row: int, columns: Mapping[str, Any], count: int) -> EncodedPrompt:
        encoded = self._encoder.encode(_not_continued(prompt), row + 1)
        own = {
            key: value[row] for key, value in columns.items() if isinstance(value, list | tuple) and len(value) == count
        }
        return dataclasses.replace(encoded, prompt=dataclasses.replace(encoded.prompt, columns=own))


class _KeepScale(TrainerCallback):
    """Keeps the moments of the running scale in the trainer's state, which every checkpoint holds as JSON."""

    def __init__(self, normalizer: Normalizer) -> None:
        self._normalizer = normalizer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the moments of the checkpoint that training is resumed from."""
        if (saved := state.stateful_callbacks.get(STATE_KEY)) is not None:
            self._normalizer.load_state_dict(saved)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the moments where the next checkpoint takes them from."""
        state.stateful_callbacks[STATE_KEY] = self._normalizer.state_dict()


def _refuse(trainer: Any) -> None:
    accelerator = trainer.accelerator
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.MEGATRON_LM)
    refused = {
        "AttentionReward reads the policy's attention from a plain forward, which sharded weights (FSDP, ZeRO-3) don't "
        "give: train with DDP or ZeRO-2.": sharded or (plugin is not None and plugin.zero_stage == 3),
        "AttentionReward scores one answer to one prompt, not tool calls and their results: leave out tools and "
        "environment_factory.": getattr(trainer, "tools", None) or getattr(trainer, "environment_factories", None),
        "AttentionReward scores answers to the trainer's own prompts, and a rollout_func may make others or put an "
        "environment's tokens into the answers: leave out rollout_func.": getattr(trainer, "rollout_func", None),
    }
    for sentence, there in refused.items():
        if there:
            raise ConfigError(sentence)


def _not_continued(prompt: GivenPrompt) -> GivenPrompt:
    if not isinstance(prompt, str) and len(prompt) and prompt[-1]["role"] == "assistant":
        raise DataError(
            "the trainer's prompts: a conversation ends with the assistant, which TRL does not continue; end it with the user."
        )
    return prompt


def _training_prompts(trainer: Any, salience: SalienceConfig) -> Iterable[GivenPrompt] | None:
    dataset = trainer.train_dataset
    if hasattr(dataset, "__len__"):
        return (_not_continued(row["prompt"]) for row in dataset.select_columns(["prompt"]))
    if salience.weighting == "idf":
        raise ConfigError(
            "Words are weighed by how many prompts hold them, and the training set is streamed: give "
            "AttentionReward(prompts=[...]) a sample of it, or SalienceConfig(weighting='uniform')."
        )
    return None


def _loaded(trainer: Any) -> LoadedModel:
    """The trainer's policy as our scoring pass takes it; the very same module, not a copy."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    tokenizer = trainer.processing_class
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        path="the trainer's policy",
        device=trainer.accelerator.device,
        compute_dtype=torch.bfloat16 if next(model.parameters()).dtype == torch.bfloat16 else torch.float32,
        architecture=architecture_of(model.config),
        stop_ids=stop_tokens(model.generation_config, tokenizer),
        lora=hasattr(model, "peft_config"),
        notes=(),
    )


@dataclasses.dataclass(frozen=True)
class _Starting:
    """A frozen model, as :class:`~cagsr.scoring.scorer.FrozenModel` asks for it."""

    module: nn.Module
    model: Callable[[], AbstractContextManager[nn.Module]]


def _reference(trainer: Any, loaded: LoadedModel) -> FrozenModel:
    """The model that training started from: TRL's own reference where it has one, else as cagsr's."""
    if loaded.lora and "ref" in loaded.model.peft_config:
        return _Starting(loaded.model, partial(_starting_adapter, loaded.model))
    # With sync_ref_model TRL's reference follows the policy.
    if getattr(trainer, "ref_model", None) is not None and not getattr(trainer.args, "sync_ref_model", False):
        model = trainer.accelerator.unwrap_model(trainer.ref_model)
        return _Starting(model, lambda: nullcontext(model))
    if trainer.state.global_step > 0:
        raise ConfigError(
            "attention.source reference needs the starting model: call reward.bind(trainer) before train()."
        )
    own = Reference(loaded)
    if not loaded.lora:
        # TRL and accelerate put wrappers on the policy's forward that hold the policy itself: a copy of them would run it.
        vars(own.module).pop("forward", None)
    return _Starting(own.module, own.model)


@contextmanager
def _starting_adapter(model: Any) -> Iterator[Any]:
    """TRL's copy of an adapter that was there before training, as its trainers use it."""
    from trl.trainer.utils import use_adapter

    with use_adapter(model, adapter_name="ref"):
        yield model
