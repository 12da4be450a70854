"""pass@k: the probability that one of k answers passes, estimated without bias from n of them."""

from collections.abc import Sequence
from math import comb, isfinite, nan

import numpy as np

from cagsr.evaluation.intervals import Floats

PASSING = ("passed", "correct")
"""Measures of single answers, 1 or 0, of which there is a pass@k."""


def pass_at_k(answers: int, passing: int, k: int) -> float:
    """``1 - C(n - c, k) / C(n, k)`` of ``n`` answers of which ``c`` pass (Chen et al., 2021, arXiv 2107.03374, equation 1).

    ValueError for k above n.
    """
    if k > answers:
        raise ValueError(f"pass@{k} needs {k} answers, and there are {answers}")
    return 1.0 - comb(answers - passing, k) / comb(answers, k)


def passes(parts: Sequence[Floats]) -> dict[str, Floats]:
    """``pass@k`` for k = 1, 2, 4 ... and all, of the answers to each prompt (1 or 0 each; NaN: not judged), ``(prompts,)``.

    NaN for a prompt with an answer that was not judged.
    """
    fewest = min(len(part) for part in parts)
    ks = sorted({fewest, *(2**power for power in range(fewest.bit_length()) if 2**power <= fewest)})
    return {
        f"pass@{k}": np.array(
            [pass_at_k(len(part), int(part.sum()), k) if all(map(isfinite, part)) else nan for part in parts]
        )
        for k in ks
    }
