"""Coverage: was each important word of the prompt looked at?

Notation of docs/reward.md: ``A[t, w]`` is the attention from the position that predicts response token t to
prompt word w, ``s_w`` the salience of the word divided by the prompt's sum.
"""

from __future__ import annotations

import torch
from torch import Tensor


def normalized_salience(salience: Tensor) -> Tensor:
    """Divide ``(batch, words)`` weights >= 0 by their row sums; a row of zeros stays zero. Returns float32."""
    weights = salience.float()
    total = weights.sum(dim=1, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0)


def coverage_gains(word_attention: Tensor, salience: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """How much each response token adds to the saturating coverage.

    ``C_t = sum_w s_w min(1, max_{u <= t} A[u, w] / tau)`` only grows with t; the gain of token t is ``C_t - C_{t-1}``,
    so that the gains of an answer sum to its coverage.

    Args:
        word_attention: ``(batch, response, words)``.
        salience: ``(batch, words)`` weights >= 0, 0 on padding; normalised here.
        mask: ``(batch, response)`` bool, real response tokens.
        threshold: tau > 0, the attention at which a word counts as covered.

    Returns:
        ``(batch, response)`` float32 in [0, 1], 0 on masked tokens.
    """
    looked = torch.where(mask[:, :, None], word_attention.float(), 0.0)
    if looked.shape[1] == 0:
        return looked.new_zeros(mask.shape)
    covered = (looked.cummax(dim=1).values / threshold).clamp(max=1.0)
    before = torch.nn.functional.pad(covered[:, :-1], (0, 0, 1, 0))
    return ((covered - before) * normalized_salience(salience)[:, None, :]).sum(dim=2)


def saturating_coverage(word_attention: Tensor, salience: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """Saturating coverage ``C = sum_w s_w min(1, max_t A[t, w] / tau)``, ``(batch,)`` float32 in [0, 1].

    Arguments as in :func:`coverage_gains`. An answer without tokens, and a prompt without a salient word, give 0.
    """
    looked = torch.where(mask[:, :, None], word_attention.float(), 0.0)
    if looked.shape[1] == 0:
        return looked.new_zeros(mask.shape[0])
    covered = (looked.amax(dim=1) / threshold).clamp(max=1.0)
    return (covered * normalized_salience(salience)).sum(dim=1)


def copy_coverage(word_attention: Tensor, salience: Tensor, same: Tensor, mask: Tensor, words: Tensor) -> Tensor:
    """Copy coverage: the share of salience whose word is said by the token that looks at it hardest.

    Word w counts when the token generated at ``argmax_t A[t, w]`` says what one of the word's pieces says.

    Args:
        word_attention: ``(batch, response, words)``.
        salience: ``(batch, words)`` weights >= 0, 0 on padding; normalised here.
        same: ``(batch, response, prompt)`` bool, the response token says what the salient prompt token says
            (:func:`cagsr.reward.said.says`); False on padding.
        mask: ``(batch, response)`` bool, real response tokens.
        words: ``(batch, prompt)`` int64, the word of each prompt token, -1 for none.

    Returns:
        ``(batch,)`` float32 in [0, 1]; 0 for an answer without tokens. A word that no token looks at does not count.
    """
    num_words = word_attention.shape[2]
    if word_attention.shape[1] == 0 or num_words == 0:
        return torch.zeros(mask.shape[0], dtype=torch.float32, device=mask.device)
    looked = torch.where(mask[:, :, None], word_attention.float(), 0.0)
    strongest, position = looked.max(dim=1)  # (batch, words)
    index = words.clamp(min=0)
    hardest = position.gather(1, index)[:, None]  # (batch, 1, prompt): where the word of each prompt token is looked at
    hit = (same.gather(1, hardest)[:, 0] & (words >= 0)).float()
    copied = torch.zeros_like(strongest).scatter_reduce(1, index, hit, reduce="amax")
    return (copied * (strongest > 0) * normalized_salience(salience)).sum(dim=1)


def mean_mass(attention: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """Mean attention mass on salient tokens, ``mean_t sum_{j in S} A[t, j]``: the literal reading of arXiv 2502.10482.

    It falls as an answer grows (docs/reward.md has the correlation with length), so it pays for short answers.

    Args:
        attention: ``(batch, response, prompt)``.
        words: ``(batch, prompt)`` int64, the salient word of each token, -1 for none.
        mask: ``(batch, response)`` bool, real response tokens.

    Returns:
        ``(batch,)`` float32 in [0, 1]; 0 for an answer without tokens.
    """
    mass = torch.where((words >= 0)[:, None, :], attention.float(), 0.0).sum(dim=2)
    return torch.where(mask, mass, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
