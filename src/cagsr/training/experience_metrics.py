"""What is logged of a batch of experience, averaged over all processes."""

from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor

from cagsr.advantage.kl import kl_k1, kl_k3
from cagsr.flow import EpisodeBatch, Experience, Returns
from cagsr.objectives.value import explained_variance
from cagsr.reward.metrics import reward_metrics, within_group_correlation
from cagsr.reward.terms.repetition import ngram_repetition, without_stop_token
from cagsr.rollout.rows import take_rows


def experience_metrics(
    experience: Experience, kl_coef: float, accelerator: Accelerator, *, turns: bool = False
) -> dict[str, float]:
    """Metrics of this process's experience by their TRL names; every process calls it and gets those of all.

    Of sampled answers: references among them are left out.
    """
    if experience.episodes.given is not None:
        experience = take_rows(experience, (~experience.episodes.given).nonzero()[:, 0])

    def reduce(tensor: Tensor) -> Tensor:
        return accelerator.reduce(tensor, reduction="sum")

    episodes, readings, returns = experience.episodes, experience.readings, experience.returns
    mask = episodes.sampled
    lengths = mask.sum(dim=1).float()
    kl = kl_k1(readings.logprobs, experience.reference_logprobs).masked_fill(~mask, 0.0).sum(dim=1)
    k3 = kl_k3(readings.logprobs, experience.reference_logprobs).masked_fill(~mask, 0.0).sum(dim=1)
    per_sequence = torch.stack(
        [
            kl,
            k3,
            (readings.entropy * mask).sum(dim=1),
            lengths,
            returns.total,
            episodes.ended.float(),
            # Repeated 3-grams are watched whatever the reward is made of.
            ngram_repetition(episodes.ids, without_stop_token(mask, episodes.ended), n=3),
            (readings.sampling_correction * mask).sum(dim=1),
            torch.ones_like(lengths),
        ]
    ).sum(dim=1)
    sums = reduce(per_sequence).tolist()
    sequences = sums[-1]
    kl_mean, k3_mean, entropy_mean, length, score, ended, repeated, correction = (
        value / sequences for value in sums[:-1]
    )
    metrics = {
        "objective/kl": kl_mean,
        "objective/kl_k3": k3_mean,
        "objective/entropy": entropy_mean,
        "objective/scores": score,
        "objective/rlhf_reward": score - kl_coef * kl_mean,
        "policy/entropy_avg": entropy_mean / length,
        "response/length": length,
        "response/ended": ended,
        "response/repetition": repeated,
        "sampling/correction_avg": correction / length,
    }
    if readings.values is not None:
        found = explained_variance(readings.values, experience.targets.returns, mask, reduce)
        metrics["val/explained_variance"] = found
    if turns:
        answers, later, alone = reduce(_answers_of_turns(experience.episodes)).tolist()
        metrics |= {"episode/turns": answers / sequences, "episode/alone": alone / max(later, 1.0)}
    # Whether the reward pays for what the starting model finds likely, and for saying the same again, whatever it is made of.
    told = {
        "likelihood": (experience.reference_logprobs * mask).sum(dim=1) / lengths.clamp(min=1),
        "repetition": ngram_repetition(episodes.ids, without_stop_token(mask, episodes.ended), n=3),
    }
    everyone, all_lengths, group = _of_all_processes(returns, lengths, episodes.prompts.group, accelerator)
    for name, values in told.items():
        found = within_group_correlation(accelerator.gather(values), everyone.total, group)
        metrics[f"rewards/total/{name}_correlation"] = found
    return metrics | reward_metrics(everyone, all_lengths, group)


def _answers_of_turns(episodes: EpisodeBatch) -> Tensor:
    """How many answers there are, how many in later turns, and how many of these are the only one of their prompt."""
    last = torch.where(episodes.sampled, episodes.turn, 0).amax(dim=1)
    later = torch.arange(1, 1 + int(last.max()), device=last.device)
    there = last[:, None] >= later  # (batch, later turns)
    same = episodes.prompts.group[:, None] == episodes.prompts.group
    alone = there & ((same.float() @ there.float()) == 1)
    return torch.stack([there.sum() + len(last), there.sum(), alone.sum()]).float()


def _of_all_processes(
    returns: Returns, lengths: Tensor, group: Tensor, accelerator: Accelerator
) -> tuple[Returns, Tensor, Tensor]:
    """The answers of all processes together, so that what is logged does not depend on how many there are."""
    if accelerator.num_processes == 1:
        return returns, lengths, group
    # Every process numbers its prompts from 0.
    apart = group * accelerator.num_processes + accelerator.process_index
    everywhere = replace(
        returns,
        total=accelerator.gather(returns.total),
        terms={name: accelerator.gather(values) for name, values in returns.terms.items()},
        contributions={name: accelerator.gather(values) for name, values in returns.contributions.items()},
    )
    return everywhere, accelerator.gather(lengths), accelerator.gather(apart)
