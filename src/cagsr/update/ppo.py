"""One step of the method, to be read from top to bottom.

``PPO.collect``: prompts -> sampled answers -> one scoring pass (log-probabilities, values, prompt attention) -> reward ->
advantages. ``PPO.update``: a few epochs of clipped policy and value losses on them. What the checklist of "The N+
Implementation Details of RLHF with PPO" (Huang et al., 2024) asks for is done where it belongs and said in a comment.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from cagsr.advantage.estimate import estimate_advantages
from cagsr.advantage.kl import KLController, kl_k1, kl_k3
from cagsr.attention import PromptAttentionReader
from cagsr.config import TrainConfig
from cagsr.errors import CagsrError
from cagsr.flow import EncodedPrompt, Experience, Reward, Rollout, Scores, Trainer
from cagsr.models.actor_critic import ActorCritic
from cagsr.models.inputs import PassInputs
from cagsr.models.load import LoadedModel
from cagsr.models.reference import Reference
from cagsr.models.sharding import first_pass, full_tensor, gathered, shard
from cagsr.models.sharing import shares_prompts, sharing_stopped, stop_sharing
from cagsr.reward.build import attention_terms
from cagsr.reward.combine import RewardFunction
from cagsr.reward.keep import reward_batch
from cagsr.reward.metrics import reward_metrics
from cagsr.reward.repetition import repetition, without_stop_token
from cagsr.rollout.build import build_sampler
from cagsr.rollout.rows import prompt_batch, rollout_rows
from cagsr.support.clock import Clock
from cagsr.support.progress import each, working
from cagsr.update.compared import compare_with_plain
from cagsr.update.engine_mismatch import OWN_LIMIT, account_for_engine, decoding_metrics
from cagsr.update.losses import explained_variance, masked_sum_loss, policy_loss, value_loss
from cagsr.update.schedule import learning_rate_factor
from cagsr.update.score import length_sorted_chunks, score_policy, score_reference
from cagsr.update.statistics import logprobs_and_entropy, token_logprobs

FIRST_RATIO_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}


class PPO:
    """The policy, its frozen reference, the reward and the optimizer, and what one step does with them.

    Args:
        config: all settings.
        loaded: the starting model.
        reward: the weighted sum of reward terms.
        accelerator: device placement and processes.
    """

    def __init__(
        self, config: TrainConfig, loaded: LoadedModel, reward: RewardFunction, accelerator: Accelerator
    ) -> None:
        self.config = config
        self.loaded = loaded
        self.sampler = build_sampler(config, loaded, accelerator)
        self.reward = reward
        self.accelerator = accelerator
        self.reference = Reference(loaded)
        self.actor_critic = ActorCritic.build(loaded, config.ppo)
        self.kl_controller = KLController.build(config.ppo)
        attention = config.attention
        watched = self.reference.module if attention.source == "reference" else loaded.model
        self.reader = PromptAttentionReader(watched, layers=attention.layers, heads=attention.heads)
        self.attention_terms = attention_terms(reward.terms)
        self.clock = Clock(loaded.device, exact=config.run.profile)
        self._first_means: dict[str, float] = {}
        self._warnings: list[str] = []
        self.optimizer = self._build_optimizer()
        self._learning_rate_factor = partial(learning_rate_factor, ppo=config.ppo, steps=config.run.steps)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._learning_rate_factor)
        self.module: torch.nn.Module = self._distributed()

    def collect(self, prompts: Sequence[EncodedPrompt], trainer: Trainer | None = None) -> Experience:
        """Sample, score and reward answers to a batch of prompts.

        Args:
            prompts: one process's share of the step's prompts.
            trainer: what TRL's reward functions may ask; None: nothing is trained.

        Returns:
            Everything the update needs, fixed before its first gradient step.

        Raises:
            RewardError: a term fails or gives a value that is not finite.
            RolloutError: an engine that samples fails, or samples from something else than the policy.
        """
        config, loaded = self.config, self.loaded
        micro = config.ppo.micro_batch_size
        batch = prompt_batch(
            loaded, prompts, config.sampling.num_generations, self.accelerator.process_index * len(prompts)
        )
        terms, pooling = self.attention_terms, config.salience.pooling
        reader = None if terms == [] else self.reader  # no term looks at the attention: it is not read
        from_policy = config.attention.source == "policy"
        with gathered(self.actor_critic):
            with self.clock.part("rollout"):
                rollout = self.sampler.sample(batch, config.sampling)
            scores, pass_metrics = self._score(rollout, reader if from_policy else None)
        limit = OWN_LIMIT[loaded.compute_dtype] if config.rollout.max_logp_difference else 0.0
        pass_metrics |= decoding_metrics(scores, rollout, limit, self.accelerator.gather)
        scores, engine_metrics = account_for_engine(scores, rollout, config.rollout, self.accelerator.gather)
        with self.clock.part("reference"), self.reference.model() as reference:
            reference_logprobs, reference_attention = score_reference(
                reference,
                loaded,
                rollout,
                config.sampling.temperature,
                reader=None if from_policy else reader,
                micro_batch_size=micro,
                terms=terms,
                pooling=pooling,
            )
        attention = scores.attention if from_policy else reference_attention
        with self.clock.part("reward"), working("computing the reward"):
            known = reward_batch(rollout, scores, reference_logprobs, attention, pooling)
            reward = self.reward(dataclasses.replace(known, trainer=trainer))
            advantages = estimate_advantages(
                config.ppo, reward, rollout, scores, reference_logprobs, self.kl_controller.kl_coef, reduce=self.reduce
            )
        return Experience(rollout, scores, reference_logprobs, reward, advantages, pass_metrics | engine_metrics)

    def update(self, experience: Experience) -> dict[str, float]:
        """Train on one batch of experience.

        Args:
            experience: what ``collect`` gave.

        Returns:
            Metrics by their TRL names, averaged over processes.
        """
        ppo = self.config.ppo
        count = experience.rollout.response_ids.shape[0]
        mini_batches = min(ppo.num_mini_batches, count)
        totals: dict[str, float] = {}
        first_ratio_error = 0.0
        with working("updating", ppo.num_ppo_epochs * mini_batches, "gradient steps") as task:
            for epoch in range(ppo.num_ppo_epochs):
                # Not chunk(): it makes fewer parts than asked for, the last one small.
                for number, index in enumerate(torch.randperm(count).tensor_split(mini_batches)):
                    found = self._gradient_step(experience, index.to(self.loaded.device))
                    if epoch == 0 and number == 0:
                        first_ratio_error = found["ratio_error"]
                    for name, value in found.items():
                        totals[name] = totals.get(name, 0.0) + value
                    task.advance()
        self.sampler.policy_changed()
        self._check_first_ratio(first_ratio_error)
        steps = ppo.num_ppo_epochs * mini_batches
        means = {name: value / steps for name, value in totals.items()}
        metrics = self._experience_metrics(experience) | dict(experience.sampler_metrics)
        metrics |= {
            "policy/approxkl_avg": means["approx_kl"],
            "policy/clipfrac_avg": means["clipped"],
            "policy/grad_norm": means["grad_norm"],
            "loss/policy_avg": means["policy_loss"],
            "val/ratio": means["ratio"],
            "val/ratio_first_error": first_ratio_error,
            "lr": self.scheduler.get_last_lr()[0],
            "kl_coef": self.kl_controller.kl_coef,
        }
        if experience.scores.values is not None:
            metrics["loss/value_avg"] = means["value_loss"]
        sequences = float(self.reduce(torch.tensor(float(count), device=self.loaded.device)))
        self.kl_controller.update(metrics["objective/kl"], int(sequences))
        self.scheduler.step()
        return metrics

    def reduce(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes."""
        return self.accelerator.reduce(tensor, reduction="sum")

    def modules(self) -> dict[str, torch.nn.Module]:
        """What a checkpoint holds: the policy and what estimates values."""
        found = {"policy": self.loaded.model}
        if self.actor_critic.value_head is not None:
            found["value_head"] = self.actor_critic.value_head
        if self.actor_critic.critic is not None:
            found["critic"] = self.actor_critic.critic
        return found

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

    def _score(self, rollout: Rollout, reader: PromptAttentionReader | None) -> tuple[Scores, dict[str, float]]:
        """The scoring pass, compared with the plain one; where they differ, the plain one from now on."""
        config, loaded, micro = self.config, self.loaded, self.config.ppo.micro_batch_size

        def scored() -> Scores:
            with self.clock.part("scoring"):
                return score_policy(
                    self.actor_critic,
                    loaded,
                    rollout,
                    config.sampling,
                    reader=reader,
                    micro_batch_size=micro,
                    terms=self.attention_terms,
                    pooling=config.salience.pooling,
                )

        scores = scored()
        with self.clock.part("comparison"):
            metrics, warning = compare_with_plain(
                scores, loaded, rollout, config.sampling.temperature, micro, self.accelerator.gather
            )
        if warning is not None:
            self._warnings.append(warning)
            scores = scored()
        return scores, metrics

    def _gradient_step(self, experience: Experience, index: Tensor) -> dict[str, float]:
        """One optimizer step on the sequences ``index``, in micro-batches."""
        ppo, rollout, scores = self.config.ppo, experience.rollout, experience.scores
        # Normalised by the token count of the whole mini-batch over all processes; DDP averages gradients over
        # processes, hence the factor.
        tokens = self.reduce(rollout.response_mask[index].sum().float()) / self.accelerator.num_processes
        sums: dict[str, Tensor] = {}
        ratio_error = torch.zeros((), device=self.loaded.device)
        # Sharded weights are gathered by all processes together, so all must run the model equally often: once a chunk.
        share = not self.accelerator.is_fsdp2 and shares_prompts(self.loaded, rollout)
        chunks = length_sorted_chunks(rollout, ppo.micro_batch_size, index, share=share)
        for number, chunk in enumerate(each("forward and backward", chunks, "batches")):
            inputs = PassInputs.of(rollout_rows(rollout, chunk), share=share)
            mask = inputs.response_mask
            width = mask.shape[1]
            last = number == len(chunks) - 1
            # Sharded gradients are brought together each time: kept back, they would be held whole.
            wait = not last and not self.accelerator.is_fsdp2
            with self.accelerator.no_sync(self.module) if wait else nullcontext():
                with self.clock.part("forward"), self.loaded.autocast():
                    logits, values = self.module(inputs)
                temperature = self.config.sampling.temperature
                entropy = None
                if ppo.entropy_coef > 0:
                    logprobs, entropy = logprobs_and_entropy(logits, inputs.response_ids, temperature)
                else:
                    logprobs = token_logprobs(logits, inputs.response_ids, temperature)
                policy = policy_loss(
                    logprobs,
                    scores.logprobs[chunk, :width],
                    experience.advantages.advantages[chunk, :width],
                    mask,
                    tokens,
                    ppo.cliprange,
                    scores.sampling_correction[chunk, :width],
                )
                loss = policy.loss
                losses = {"policy_loss": policy.loss.detach()}
                if values is not None:
                    assert scores.values is not None
                    error = value_loss(
                        values,
                        scores.values[chunk, :width],
                        experience.advantages.returns[chunk, :width],
                        mask,
                        tokens,
                        ppo.cliprange_value,
                    )
                    loss = loss + ppo.vf_coef * error
                    losses["value_loss"] = error.detach()
                if ppo.kl_in == "loss" and self.kl_controller.kl_coef > 0:
                    estimator = kl_k3 if ppo.kl_estimator == "k3" else kl_k1
                    penalty = estimator(logprobs, experience.reference_logprobs[chunk, :width])
                    loss = loss + self.kl_controller.kl_coef * masked_sum_loss(penalty, mask, tokens)
                if entropy is not None:
                    loss = loss - ppo.entropy_coef * masked_sum_loss(entropy, mask, tokens)
                with self.clock.part("backward"):
                    self.accelerator.backward(loss)
            found = losses | {
                "ratio": (policy.ratio * mask).sum() / tokens,
                "clipped": policy.clipped / tokens,
                "approx_kl": policy.approx_kl / tokens,
            }
            for name, value in found.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value
            ratio_error = torch.maximum(ratio_error, ((policy.ratio - 1).abs() * mask).max())
        with self.clock.part("optimizer"):
            grad_norm = self.accelerator.clip_grad_norm_(self.module.parameters(), ppo.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        averages = self.reduce(torch.stack([value.float() for value in sums.values()])) / self.accelerator.num_processes
        result = dict(zip(sums, averages.tolist(), strict=True))
        result["grad_norm"] = float(full_tensor(grad_norm))
        # Of all processes: one that stopped alone would leave the others waiting.
        result["ratio_error"] = float(self.accelerator.gather(ratio_error[None]).max())
        return result

    def _check_first_ratio(self, error: float) -> None:
        """Before the first gradient step the policy is the one that was scored: the ratio must be 1."""
        if not math.isfinite(error) or error > FIRST_RATIO_TOLERANCE[self.loaded.compute_dtype]:
            raise CagsrError(
                f"The probability ratio before the first update is off by {error:.2g} instead of 0: the model's forward "
                "pass is not deterministic (dropout inside it, or a batch-dependent layer), so PPO would be wrong."
            )

    def _experience_metrics(self, experience: Experience) -> dict[str, float]:
        rollout, scores, reward = experience.rollout, experience.scores, experience.reward
        mask = rollout.response_mask
        lengths = mask.sum(dim=1).float()
        kl = kl_k1(scores.logprobs, experience.reference_logprobs).masked_fill(~mask, 0.0).sum(dim=1)
        k3 = kl_k3(scores.logprobs, experience.reference_logprobs).masked_fill(~mask, 0.0).sum(dim=1)
        entropy = (scores.entropy * mask).sum(dim=1)
        per_sequence = torch.stack(
            [
                kl,
                k3,
                entropy,
                lengths,
                reward.total,
                rollout.ended.float(),
                _repetition(rollout),
                (scores.sampling_correction * mask).sum(dim=1),
                torch.ones_like(lengths),
            ]
        ).sum(dim=1)
        sums = self.reduce(per_sequence).tolist()
        sequences = sums[-1]
        kl_mean, k3_mean, entropy_mean, length, score, ended, repetition, correction = (
            value / sequences for value in sums[:-1]
        )
        metrics = {
            "objective/kl": kl_mean,
            "objective/kl_k3": k3_mean,
            "objective/entropy": entropy_mean,
            "objective/scores": score,
            "objective/rlhf_reward": score - self.kl_controller.kl_coef * kl_mean,
            "policy/entropy_avg": entropy_mean / length,
            "response/length": length,
            "response/ended": ended,
            "response/repetition": repetition,
            "sampling/correction_avg": correction / length,
        }
        if scores.values is not None:
            metrics["val/explained_variance"] = explained_variance(
                scores.values, experience.advantages.returns, mask, self.reduce
            )
        metrics |= reward_metrics(*self._of_all_processes(reward, lengths, rollout.prompts.group))
        # Contributions centred on each prompt average to 0. What rises is the weighted sum of the terms' means since the
        # first step, each in its own unit of spread.
        means = {name: metrics[f"rewards/{name}/mean"] for name in self.reward.names}
        if not self._first_means:
            self._first_means = means
        metrics["objective/raw_scores"] = sum(
            weight * self.reward.normalizer.scale(name) * (means[name] - self._first_means[name])
            for name, weight in zip(self.reward.names, self.reward.weights, strict=True)
        )
        return metrics

    def _of_all_processes(self, reward: Reward, lengths: Tensor, group: Tensor) -> tuple[Reward, Tensor, Tensor]:
        """The answers of all processes together, so that what is logged does not depend on how many there are."""
        if self.accelerator.num_processes == 1:
            return reward, lengths, group

        def gather(values: Tensor) -> Tensor:
            return self.accelerator.gather(values)

        # Every process numbers its prompts from 0.
        apart = group * self.accelerator.num_processes + self.accelerator.process_index
        everywhere = Reward(
            total=gather(reward.total),
            per_token=reward.per_token,
            terms={name: gather(values) for name, values in reward.terms.items()},
            contributions={name: gather(values) for name, values in reward.contributions.items()},
        )
        return everywhere, gather(lengths), gather(apart)

    def _distributed(self) -> torch.nn.Module:
        """Wrap the module for the processes: DDP around it, or its weights divided in place (FSDP2)."""
        if not self.accelerator.is_fsdp2:
            return self.accelerator.prepare_model(self.actor_critic)
        shard(self.accelerator, self.actor_critic, self.optimizer)
        with first_pass(self.actor_critic), self.loaded.autocast():
            self.actor_critic(PassInputs.tiny(self.loaded.device))
        self.reference.shard(self.accelerator)
        return self.actor_critic

    def _build_optimizer(self) -> torch.optim.Optimizer:
        ppo = self.config.ppo
        policy = [parameter for parameter in self.loaded.model.parameters() if parameter.requires_grad]
        groups = [{"params": policy, "lr": ppo.learning_rate}]
        if values := self.actor_critic.value_parameters():
            groups.append({"params": values, "lr": ppo.value_learning_rate})
        return torch.optim.AdamW(groups, eps=ppo.adam_eps, weight_decay=ppo.weight_decay)


def _repetition(rollout: Rollout) -> Tensor:
    """Repeated 3-grams per answer, ``(batch,)``: watched whatever the reward is made of."""
    return repetition(rollout.response_ids, without_stop_token(rollout.response_mask, rollout.ended), n=3)
