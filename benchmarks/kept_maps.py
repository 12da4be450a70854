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
from cagsr.flow import EpisodeBatch, Prompt, PromptBatch, Readings, RewardBatch
from cagsr.models.texts import TokenTexts
from cagsr.reward.micro_batch import TermVisitor
from cagsr.reward.term import RewardTerm
from cagsr.reward.terms.coverage import Coverage, CoverageConfig
from cagsr.reward.terms.grounded_coverage import GroundedCoverage, GroundedCoverageConfig
from cagsr.reward.values import term_values
from cagsr.rollout.rows import episode_rows, take_rows

LENGTHS = (256, 1024, 4096, 16384)
ANSWERS, RESPONSE, MICRO_BATCH = 16, 128, 2
YES = torch.ones(1000, dtype=torch.bool)
TEXTS = TokenTexts(torch.arange(1000), torch.arange(1, 1001), torch.full((1000,), 1009), YES, YES)
"""Each token is a word of its own."""
TERMS: tuple[RewardTerm, ...] = (
    Coverage(CoverageConfig(threshold=0.1)),
    GroundedCoverage(GroundedCoverageConfig(threshold=0.1), TEXTS),
)


def measure(prompt: int) -> dict[str, float]:
    """MiB at the peak of reading and rewarding a step's answers, with and without keeping the maps."""
    episodes = _episodes(prompt)
    zeros = torch.zeros(ANSWERS, RESPONSE)
    readings = Readings(zeros, zeros, zeros, zeros)

    def run(keep: bool) -> None:
        visitor = TermVisitor(episodes, TERMS, "sum", keep_maps=keep)
        for index in torch.arange(ANSWERS).split(MICRO_BATCH):
            maps = torch.rand(len(index), RESPONSE, prompt) / prompt
            visitor.visit(index, episode_rows(episodes, index), take_rows(readings, index), maps)
            del maps
        batch = RewardBatch(episodes, readings, None, visitor.attention())
        for term in TERMS:
            term_values(term, batch, visitor.values.get(term.name))

    run(False)  # libraries allocate their own buffers at the first call
    return {name: peak_of(lambda keep=keep: run(keep)) for name, keep in (("worked out", False), ("kept", True))}  # type: ignore[misc]


def _episodes(prompt: int) -> EpisodeBatch:
    """Random answers to one prompt, half of whose tokens are salient, two to a word."""
    torch.manual_seed(0)
    numbers = torch.arange(prompt)
    words = torch.where(numbers % 4 < 2, numbers // 4, -1).expand(ANSWERS, prompt)
    prompts = PromptBatch(
        prompts=(Prompt(1, ""),) * ANSWERS,
        ids=torch.randint(0, 1000, (1, prompt)).expand(ANSWERS, prompt),
        real=torch.ones(ANSWERS, prompt, dtype=torch.bool),
        words=words,
        salience=torch.ones(ANSWERS, int(words.max()) + 1),
        group=torch.zeros(ANSWERS, dtype=torch.int64),
    )
    shape = (ANSWERS, RESPONSE)
    mask = torch.ones(shape, dtype=torch.bool)
    ids, ended = torch.randint(0, 1000, shape), torch.ones(ANSWERS).bool()
    return EpisodeBatch.of_one_turn(prompts, ids, mask, ended, ("",) * ANSWERS)


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
