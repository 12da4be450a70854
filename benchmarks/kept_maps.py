"""``python -m benchmarks.kept_maps``: what a step holds of the attention of all its answers, by prompt length.

Once with the maps kept until the reward is computed, as a reward function of the user's may need them, and once with
the built-in terms worked out of each micro-batch and its maps dropped. The maps are random, in place of a model's: this
is about what comes after the reading. Memory is the peak above what was there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from benchmarks import memory
from benchmarks.capture import peak_of
from cagsr.flow import EpisodeBatch, Prompt, PromptBatch, Scores
from cagsr.models.texts import TokenTexts
from cagsr.reward.micro_batch import AttentionKeeper, reward_batch
from cagsr.reward.terms import AttentionTerm, Coverage, GroundedCoverage
from cagsr.reward.values import term_values
from cagsr.rollout.rows import episode_rows

LENGTHS = (256, 1024, 4096, 16384)
ANSWERS, RESPONSE, MICRO_BATCH = 16, 128, 2
YES = torch.ones(1000, dtype=torch.bool)
TEXTS = TokenTexts(torch.arange(1000), torch.arange(1, 1001), torch.full((1000,), 1009), YES, YES)
"""Each token is a word of its own."""
TERMS: tuple[AttentionTerm, ...] = (Coverage(0.1, dense=False), GroundedCoverage(0.1, False, TEXTS))


def measure(prompt: int) -> dict[str, float]:
    """MiB at the peak of reading and rewarding a step's answers, with and without keeping the maps."""
    rollout = _rollout(prompt)
    zeros = torch.zeros(ANSWERS, RESPONSE)
    scores = Scores(zeros, zeros, zeros, zeros)

    def run(keep: bool) -> None:
        keeper = AttentionKeeper(rollout, None if keep else TERMS)
        for index in torch.arange(ANSWERS).split(MICRO_BATCH):
            keeper.add(index, episode_rows(rollout, index), torch.rand(len(index), RESPONSE, prompt) / prompt)
        batch = reward_batch(rollout, scores, None, keeper.kept)
        for term in TERMS:
            term_values(term, batch)

    run(False)  # libraries allocate their own buffers at the first call
    return {name: peak_of(lambda keep=keep: run(keep)) for name, keep in (("worked out", False), ("kept", True))}  # type: ignore[misc]


def _rollout(prompt: int) -> EpisodeBatch:
    """Random answers to one prompt, half of whose tokens are salient, two to a word."""
    torch.manual_seed(0)
    numbers = torch.arange(prompt)
    words = torch.where(numbers % 4 < 2, numbers // 4, -1).expand(ANSWERS, prompt)
    prompts = PromptBatch(
        prompts=(Prompt(1, ""),) * ANSWERS,
        ids=torch.randint(0, 1000, (1, prompt)).expand(ANSWERS, prompt),
        mask=torch.ones(ANSWERS, prompt, dtype=torch.bool),
        words=words,
        salience=torch.ones(ANSWERS, int(words.max()) + 1),
        group=torch.zeros(ANSWERS, dtype=torch.int64),
    )
    shape = (ANSWERS, RESPONSE)
    mask = torch.ones(shape, dtype=torch.bool)
    return EpisodeBatch(prompts, torch.randint(0, 1000, shape), mask, torch.ones(ANSWERS).bool(), ("",) * ANSWERS)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every length and print a line for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kept_maps", description=__doc__)
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="longest prompt in tokens (default: 16384)")
    arguments = parser.parse_args(argv)
    memory.give_back_at_once()
    for prompt in (length for length in LENGTHS if length <= arguments.longest):
        found = measure(prompt)
        maps = ANSWERS * RESPONSE * prompt * 4 / 2**20
        sys.stdout.write(
            f"{prompt} prompt tokens: maps alone {maps:.0f} MiB; kept {found['kept']:.0f} MiB, worked out "
            f"{found['worked out']:.0f} MiB at the peak: {found['kept'] / max(found['worked out'], 1.0):.1f} times\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
