"""One step of the method, to be read from top to bottom.

``PPO.collect``: prompts -> episodes -> one scoring pass (log-probabilities, values, attention) -> returns -> targets.
``PPO.update``: a few epochs of the objectives' sum on them. What the checklist of "The N+
Implementation Details of RLHF with PPO" (Huang et al., 2024) asks for is done where it belongs and said in a comment.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from cagsr.advantage.estimate import estimate_targets
from cagsr.advantage.kl import KLController
from cagsr.advantage.supervised import control_reference, imitation_targets
from cagsr.config import PPOConfig, TrainConfig
from cagsr.errors import CagsrError
from cagsr.flow import EncodedPrompt, EpisodeBatch, Experience, Readings, RewardBatch, Trainer
from cagsr.models.actor_critic import ActorCritic
from cagsr.models.inputs import PassInputs
from cagsr.models.layer_probe import LayerProbe
from cagsr.models.load import LoadedModel
from cagsr.models.reference import Reference
from cagsr.models.sharding import first_pass, full_tensor, gathered, shard
from cagsr.models.sharing import shares_prompts, sharing_stopped, stop_sharing
from cagsr.objectives.ask import logged_of, loss_of
from cagsr.objectives.build import build_objectives
from cagsr.objectives.objective import UpdateBatch
from cagsr.reward.function import RewardFunction
from cagsr.reward.micro_batch import TermVisitor
from cagsr.rollout.episodes import Player, played
from cagsr.rollout.rows import episode_rows, prompt_batch, take_rows
from cagsr.rollout.sampler import build_sampler
from cagsr.scoring.compared import compare_with_plain
from cagsr.scoring.engine_mismatch import OWN_LIMIT, account_for_engine, decoding_metrics
from cagsr.scoring.micro_batches import micro_batches
from cagsr.scoring.scorer import Scorer
from cagsr.scoring.statistics import entropy_of, logprobs_and
from cagsr.support.clock import Clock
from cagsr.support.processes import in_all
from cagsr.support.progress import each, working
from cagsr.training.experience_metrics import experience_metrics
from cagsr.training.micro_batch_size import MicroBatchSize

T = TypeVar("T")
FIRST_RATIO_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}


class PPO:
    """The policy, its frozen reference, the reward and the optimizer, and what one step does with them.

    ``player`` plays a task of several turns; None: one answer to each prompt.
    """

    def __init__(
        self,
        config: TrainConfig,
        loaded: LoadedModel,
        reward: RewardFunction,
        accelerator: Accelerator,
        player: Player | None = None,
        probe: LayerProbe | None = None,
    ) -> None:
        self.config = config
        self.loaded = loaded
        self.sampler = build_sampler(config, loaded, accelerator)
        self.player = player
        self.reward = reward
        self.accelerator = accelerator
        self.reference = Reference(loaded)
        self.actor_critic = ActorCritic.build(loaded, config.ppo)
        self.kl_controller = KLController.build(config.ppo)
        self.objectives = build_objectives(config.ppo, self.kl_controller)
        self.micro_batch_size = MicroBatchSize(config.ppo.micro_batch_size)
        self.scorer = Scorer(
            loaded,
            config.attention,
            config.sampling,
            self.micro_batch_size.size,
            actor_critic=self.actor_critic,
            reference=self.reference,
            probe=probe,
        )
        self.clock = Clock(loaded.device, exact=config.run.profile)
        self._first_means: dict[str, float] = {}
        self._logged = [one.name for one in self.objectives if getattr(one, "logged", True)]
        self._warnings: list[str] = []
        self.optimizer = self._build_optimizer()
        self._learning_rate_factor = partial(learning_rate_factor, ppo=config.ppo, steps=config.run.steps)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._learning_rate_factor)
        self.module: torch.nn.Module = self._distributed()

    def collect(self, prompts: Sequence[EncodedPrompt], trainer: Trainer | None = None) -> Experience:
        """Sample, score and reward answers to one process's share of a step's prompts.

        Gives everything the update needs, fixed before its first gradient step. ``trainer`` is what TRL's reward functions may
        ask; None: nothing is trained.

        Raises:
            RewardError: a term fails or gives a value that is not finite.
            RolloutError: an engine that samples fails, or samples from something else than the policy.
        """
        config, loaded = self.config, self.loaded
        many = config.sampling.num_generations
        batch = prompt_batch(loaded, prompts, many, self.accelerator.process_index * len(prompts))
        with gathered(self.actor_critic):
            with self.clock.part("rollout"):
                repeated = [one for one in prompts for _ in range(many)]
                sample = partial(self.sampler.sample, sampling=config.sampling)
                if self.player is None:
                    episodes = played(None, sample, repeated, batch)  # the engines tell of their own failures
                else:  # a user's code, or a server's silence, may fail in one process
                    episodes = in_all(lambda: played(self.player, sample, repeated, batch), self.accelerator)
            self.micro_batch_size.choose(self.actor_critic, loaded, episodes, self.accelerator.gather)
            visitor, readings, pass_metrics = self._score(episodes)
        limit = OWN_LIMIT[loaded.compute_dtype] if config.rollout.max_logp_difference else 0.0
        pass_metrics |= decoding_metrics(readings, episodes, limit, self.accelerator.gather)
        readings, engine_metrics = account_for_engine(readings, episodes, config.rollout, self.accelerator.gather)
        if episodes.given is not None:  # nobody drew them, so no filter of the sampler's was in the way
            own = readings.sampling_correction.masked_fill(episodes.given[:, None], 0.0)
            readings = replace(readings, sampling_correction=own)
        with self.clock.part("reference"):
            visiting = visitor if visitor.wants_attention else None
            reference_logprobs, support = self._fitting(lambda: self.scorer.frozen(episodes, readings, visiting))
            readings = replace(readings, support=support)
        with self.clock.part("reward"), working("computing the reward"):
            known = RewardBatch(episodes, readings, reference_logprobs, visitor.attention(), trainer)
            returns = self.reward(known, visitor.values)
            if config.supervision.mode == "visurf":
                returns = control_reference(returns, episodes, config.supervision.reward)
            targets = estimate_targets(
                config.ppo, returns, episodes, readings, reference_logprobs, self.kl_controller.kl_coef, self.reduce
            )
            if config.supervision.mode == "s3ft":
                targets = imitation_targets(targets, returns, episodes, config.supervision.margin)
        metrics = pass_metrics | engine_metrics
        return Experience(episodes, readings, reference_logprobs, returns, targets, metrics)

    def update(self, experience: Experience) -> dict[str, float]:
        """Train on what ``collect`` gave; gives metrics by their TRL names, averaged over processes."""
        ppo = self.config.ppo
        self.micro_batch_size.agree(self.accelerator.gather, self.loaded.device)
        count = experience.episodes.ids.shape[0]
        mini_batches = min(ppo.num_mini_batches, count)
        totals: dict[str, float] = {}
        first_ratio_error: float | None = None
        steps = ppo.num_ppo_epochs * mini_batches
        with working("updating", steps, "gradient steps") as task:
            for _ in range(ppo.num_ppo_epochs):
                # Not chunk(): it makes fewer parts than asked for, the last one small.
                for index in torch.randperm(count).tensor_split(mini_batches):
                    found = self._fitting_step(experience, index.to(self.loaded.device))
                    if first_ratio_error is None:
                        first_ratio_error = found["ratio_error"]
                    for name, value in found.items():
                        totals[name] = totals.get(name, 0.0) + value
                    task.advance()
        self.sampler.policy_changed()
        assert first_ratio_error is not None  # the settings ask for one epoch at least
        self._check_first_ratio(first_ratio_error)
        means = {name: value / steps for name, value in totals.items()}
        metrics = self._experience_metrics(experience) | dict(experience.sampler_metrics)
        metrics |= {
            "policy/approxkl_avg": means["approx_kl"],
            "policy/clipfrac_avg": means["clipped"],
            "policy/grad_norm": means["grad_norm"],
            **{f"loss/{name}_avg": means[f"{name}_loss"] for name in self._logged},
            **{f"loss/{name}": value for name, value in means.items() if "/" in name},
            "val/ratio": means["ratio"],
            "val/ratio_first_error": first_ratio_error,
            "lr": self.scheduler.get_last_lr()[0],
            "kl_coef": self.kl_controller.kl_coef,
        }
        given = experience.episodes.given
        drawn = count if given is None else int((~given).sum())
        sequences = float(self.reduce(torch.tensor(float(drawn), device=self.loaded.device)))
        self.kl_controller.update(metrics["objective/kl"], int(sequences))
        self.scheduler.step()
        return metrics

    def reduce(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes."""
        return self.accelerator.reduce(tensor, reduction="sum")

    def modules(self) -> dict[str, torch.nn.Module]:
        """What a checkpoint holds: the policy and what estimates values."""
        values = {"value_head": self.actor_critic.value_head, "critic": self.actor_critic.critic}
        return {"policy": self.loaded.model, **{name: part for name, part in values.items() if part is not None}}

    def state_dict(self) -> dict[str, Any]:
        """The small state outside modules and optimizer, as JSON values."""
        return {
            "scheduler_step": self.scheduler.last_epoch,
            "kl_controller": self.kl_controller.state_dict(),
            "reward": self.reward.state_dict(),
            "first_means": self._first_means,
            "stopped_sharing": sharing_stopped(self.loaded.model),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave (the optimizer's state must have been restored before)."""
        self.kl_controller.load_state_dict(state["kl_controller"])
        self.reward.load_state_dict(state["reward"])
        self._first_means = dict(state["first_means"])
        if state.get("stopped_sharing", False):  # older checkpoints don't say
            stop_sharing(self.loaded.model)
        self.scheduler.last_epoch = int(state["scheduler_step"])
        factor = self._learning_rate_factor(self.scheduler.last_epoch)
        for group, base in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = base * factor
        self.scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def take_warnings(self) -> list[str]:
        """What the user should know, a sentence each, since the last call."""
        taken, self._warnings = self._warnings, []
        return taken

    def _score(self, episodes: EpisodeBatch) -> tuple[TermVisitor, Readings, dict[str, float]]:
        """The scoring pass, compared with the plain one; where they differ, the plain one from now on."""
        config, loaded = self.config, self.loaded

        def scored() -> tuple[TermVisitor, Readings]:
            visitor = TermVisitor(episodes, self.reward.terms, config.salience.pooling)
            with self.clock.part("scoring"):
                return visitor, self.scorer.policy(episodes, visitor if visitor.wants_attention else None)

        visitor, readings = self._fitting(scored)
        with self.clock.part("comparison"):
            temperature, rows = config.sampling.temperature, self.micro_batch_size.size
            metrics, warning = compare_with_plain(
                readings, loaded, episodes, temperature, rows, self.accelerator.gather
            )
        if warning is not None:
            self._warnings.append(warning)
            visitor, readings = self._fitting(scored)
        return visitor, readings, metrics

    def _fitting(self, work: Callable[[], T]) -> T:
        """A scoring pass of as many sequences at once as fit; its passes wait for no other process."""

        def with_size() -> T:
            self.scorer.micro_batch_size = self.micro_batch_size.size
            return work()

        return self.micro_batch_size.fitting(with_size)

    def _fitting_step(self, experience: Experience, index: Tensor) -> dict[str, float]:
        """A gradient step, from its beginning again where memory ran out; of several processes the others can't be called back."""
        if self.accelerator.num_processes == 1:
            return self.micro_batch_size.fitting(lambda: self._gradient_step(experience, index))
        try:
            return self._gradient_step(experience, index)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            raise CagsrError(
                f"Memory ran out in the update with {self.micro_batch_size.size} sequences at once; set --ppo.micro_batch_size to "
                "a smaller number (with several processes it can't be tried again)."
            ) from error

    def _gradient_step(self, experience: Experience, index: Tensor) -> dict[str, float]:
        """One optimizer step on the sequences ``index``, in micro-batches."""
        ppo, episodes, processes = self.config.ppo, experience.episodes, self.accelerator.num_processes
        self.optimizer.zero_grad(set_to_none=True)  # of a try that ran out of memory
        # Normalised by the weights of the whole mini-batch over all processes; DDP averages gradients over
        # processes, hence the factor.
        kinds = experience.targets.weights
        sums = self.reduce(torch.stack([weight[index].sum() for weight in kinds.values()])) / processes
        totals = dict(zip(kinds, sums.unbind(), strict=True))
        found: dict[str, Tensor] = {}
        ratio_error = torch.zeros((), device=self.loaded.device)
        # Sharded weights are gathered by all processes together, so all must run the model equally often: once a chunk.
        share = not self.accelerator.is_fsdp2 and shares_prompts(self.loaded, episodes)
        chunks = micro_batches(episodes, self.micro_batch_size.size, index, share=share)
        for number, chunk in enumerate(each("forward and backward", chunks, "batches")):
            part = episode_rows(episodes, chunk)
            last = number == len(chunks) - 1
            # Sharded gradients are brought together each time: kept back, they would be held whole.
            wait = not last and not self.accelerator.is_fsdp2
            with self.accelerator.no_sync(self.module) if wait else nullcontext():
                batch = self._pass(experience, chunk, part, totals, share)
                loss = torch.zeros((), device=self.loaded.device)
                for objective in self.objectives:
                    one = loss_of(objective, batch)
                    loss = loss + objective.coefficient * one.loss
                    for name, value in {
                        f"{objective.name}_loss": one.loss.detach(),
                        **logged_of(objective, one),
                    }.items():
                        found[name] = found.get(name, torch.zeros_like(value)) + value
                with self.clock.part("backward"):
                    self.accelerator.backward(loss)
            moved = (batch.logprobs.detach() - batch.readings.logprobs).masked_fill(~part.sampled, 0.0)
            ratio_error = torch.maximum(ratio_error, (moved.exp() - 1).abs().max())
        with self.clock.part("optimizer"):
            grad_norm = self.accelerator.clip_grad_norm_(self.module.parameters(), ppo.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        averages = self.reduce(torch.stack([value.float() for value in found.values()])) / processes
        result = dict(zip(found, averages.tolist(), strict=True))
        result["grad_norm"] = float(full_tensor(grad_norm))
        # Of all processes: one that stopped alone would leave the others waiting.
        result["ratio_error"] = float(self.accelerator.gather(ratio_error[None]).max())
        return result

    def _pass(
        self, experience: Experience, index: Tensor, part: EpisodeBatch, totals: Mapping[str, Tensor], share: bool
    ) -> UpdateBatch:
        """The update's pass over a micro-batch, with what was fixed of it before."""
        inputs, width = PassInputs.of(part, share=share), part.ids.shape[1]
        targets = take_rows(experience.targets, index, width)
        # Those that a task or a user's code has marked for imitation need not be sampled.
        at = torch.stack([part.sampled, *(weight != 0 for weight in targets.weights.values())]).any(dim=0)
        with_entropy = any(getattr(objective, "needs_entropy", False) for objective in self.objectives)
        others = [entropy_of] if with_entropy else []
        with self.clock.part("forward"), self.loaded.autocast():
            statistics = logprobs_and(*others, temperature=self.config.sampling.temperature)
            found, values = self.module(inputs, statistics, at)
        return UpdateBatch(
            episodes=part,
            logprobs=found[..., 0],
            entropy=found[..., 1] if with_entropy else None,
            values=values,
            readings=take_rows(experience.readings, index, width),
            reference_logprobs=experience.reference_logprobs[index, :width],
            targets=targets,
            totals=totals,
        )

    def _check_first_ratio(self, error: float) -> None:
        """Before the first gradient step the policy is the one that was scored: the ratio must be 1."""
        if not math.isfinite(error) or error > FIRST_RATIO_TOLERANCE[self.loaded.compute_dtype]:
            raise CagsrError(
                f"The probability ratio before the first update is off by {error:.2g} instead of 0: the model's forward "
                "pass is not deterministic (dropout inside it, or a batch-dependent layer), so PPO would be wrong."
            )

    def _experience_metrics(self, experience: Experience) -> dict[str, float]:
        metrics = experience_metrics(
            experience, self.kl_controller.kl_coef, self.accelerator, turns=self.player is not None
        )
        # Contributions centred on each prompt average to 0. What rises is the weighted sum of the terms' means since the
        # first step, each in its own unit of spread.
        means = {name: metrics[f"rewards/{name}/mean"] for name in self.reward.paid}
        if not self._first_means:
            self._first_means = means
        metrics["objective/raw_scores"] = sum(
            weight * self.reward.normalizer.scale(name) * (means[name] - self._first_means[name])
            for name, weight in self.reward.paid.items()
        )
        return metrics

    def _distributed(self) -> torch.nn.Module:
        """Wrap the module for the processes: DDP around it, or its weights divided in place (FSDP2)."""
        if not self.accelerator.is_fsdp2:
            return self.accelerator.prepare_model(self.actor_critic)
        shard(self.accelerator, self.actor_critic, self.optimizer)
        with first_pass(self.actor_critic), self.loaded.autocast():
            tiny = PassInputs.tiny(self.loaded.device)
            self.actor_critic(tiny, logprobs_and(temperature=1.0), tiny.response_real)
        self.reference.shard(self.accelerator)
        return self.actor_critic

    def _build_optimizer(self) -> torch.optim.Optimizer:
        ppo = self.config.ppo
        policy = [parameter for parameter in self.loaded.model.parameters() if parameter.requires_grad]
        groups = [{"params": policy, "lr": ppo.learning_rate}]
        if values := self.actor_critic.value_parameters():
            groups.append({"params": values, "lr": ppo.value_learning_rate})
        return torch.optim.AdamW(groups, eps=ppo.adam_eps, weight_decay=ppo.weight_decay)


def learning_rate_factor(step: int, ppo: PPOConfig, steps: int) -> float:
    """What the learning rates are multiplied by after ``step`` of a run's ``steps`` updates, in [0, 1].

    ``warmup_steps`` of a linear rise, then ``lr_scheduler``: constant, linear or cosine to 0.
    """
    if step < ppo.warmup_steps:
        return (step + 1) / (ppo.warmup_steps + 1)
    progress = (step - ppo.warmup_steps) / max(1, steps - ppo.warmup_steps)
    if ppo.lr_scheduler == "linear":
        return max(0.0, 1.0 - progress)
    if ppo.lr_scheduler == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return 1.0
