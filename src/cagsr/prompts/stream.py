"""A set of encoded prompts, and the endless order in which a run meets them; a resumed run meets the same ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from cagsr.errors import ConfigError, DataError, RunError
from cagsr.flow import EncodedPrompt, Returns
from cagsr.prompts.salience import DocumentFrequency

BUFFER_ROWS = 1_000
"""A streamed set is shuffled within a buffer of this many prompts."""


@dataclass(frozen=True)
class PromptSet:
    """Encoded prompts, with how their words were weighted and what was noted on the way."""

    prompts: Sequence[EncodedPrompt]
    """All prompts; of a streamed set the first ones only (for evaluation and inspection)."""
    frequency: DocumentFrequency
    """Behind the IDF weights; kept with a run to score new prompts alike."""
    notes: tuple[str, ...] = ()
    reopen: Callable[[], Iterator[EncodedPrompt]] | None = None
    """Only of a streamed set: starts reading all its prompts from the file; None: ``prompts`` are all."""

    def split(self, held_out: int, seed: int) -> tuple[PromptSet, PromptSet]:
        """Take ``held_out`` prompts off for evaluation: ``(training, held-out)``; ConfigError where none is left to train on.

        They are drawn at random with ``seed``, and with them goes every other row of the same prompt (text and images), so that
        no held-out prompt is trained on; of a streamed set the first ``held_out`` rows are taken (a stream can't be
        drawn from), whatever the seed.
        """
        if held_out <= 0:
            return self, replace(self, prompts=(), reopen=None)
        if self.reopen is not None:
            return self._split_stream(held_out, self.reopen)
        order = list(range(len(self.prompts)))
        random.Random(seed).shuffle(order)
        chosen: dict[
            tuple[Any, ...], int
        ] = {}  # one row for each prompt, so that the evaluation does not repeat itself
        for index in order:
            if len(chosen) == held_out:
                break
            chosen.setdefault(self.prompts[index].prompt.asked, index)
        training = [encoded for encoded in self.prompts if encoded.prompt.asked not in chosen]
        if not training:
            raise ConfigError(
                f"--evaluation.held_out {held_out} leaves no prompt to train on (there are {len(self.prompts)} rows); "
                "lower it, or name held-out prompts with --evaluation.path."
            )
        held = [self.prompts[index] for index in sorted(chosen.values())]
        return replace(self, prompts=training), replace(self, prompts=held)

    def _split_stream(
        self, held_out: int, reopen: Callable[[], Iterator[EncodedPrompt]]
    ) -> tuple[PromptSet, PromptSet]:
        if held_out >= len(self.prompts):
            raise ConfigError(
                f"--evaluation.held_out {held_out} is more than the first {len(self.prompts)} rows that a streamed set "
                "can hold out; lower it, or name held-out prompts with --evaluation.path."
            )
        training = replace(self, prompts=self.prompts[held_out:], reopen=lambda: islice(reopen(), held_out, None))
        return training, replace(self, prompts=self.prompts[:held_out], reopen=None)


class PromptStream:
    """Batches of prompts for one process: shuffled epochs without end, the order fixed by ``seed``.

    All processes walk the same global order; of each global batch (``batch_size * num_processes`` prompts) process
    ``process_index`` takes its slice. An epoch's order depends on the seed and the epoch's number only, so the state is
    two numbers. A batch may reach across the end of an epoch. Streamed sets are shuffled within a buffer of
    ``BUFFER_ROWS`` prompts and read by every process; to resume, the epoch is read again up to the position.
    """

    def __init__(
        self, prompts: PromptSet, batch_size: int, seed: int, process_index: int = 0, num_processes: int = 1
    ) -> None:
        if not prompts.prompts:
            raise DataError("There is no prompt to train on; give more prompts or hold out fewer.")
        self._prompts, self._batch_size, self._seed = prompts, batch_size, seed
        self._process_index, self._num_processes = process_index, num_processes
        self._epoch = 0
        self._position = 0  # prompts taken from this epoch by all processes together
        self._rest: Iterator[EncodedPrompt] | None = None

    @property
    def epoch(self) -> float:
        """Epochs gone through, with the fraction of the present one where the size of the set is known."""
        if self._prompts.reopen is not None:
            return float(self._epoch)
        return self._epoch + self._position / len(self._prompts.prompts)

    def next(self) -> list[EncodedPrompt]:
        """Return this process's next ``batch_size`` prompts."""
        everyones = [self._take() for _ in range(self._batch_size * self._num_processes)]
        first = self._process_index * self._batch_size
        return everyones[first : first + self._batch_size]

    def observe(self, prompts: Sequence[EncodedPrompt], returns: Returns) -> None:
        """Nothing: the order does not depend on how the answers do."""

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands, the same in every process; goes into JSON."""
        return {"seed": self._seed, "epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to where ``state`` stood; RunError where that was another seed, or a set that was longer than this one."""
        if state["seed"] != self._seed:
            raise RunError(
                f"The checkpoint shuffled its prompts with seed {state['seed']}, this run with {self._seed}; "
                f"resume with --run.seed {state['seed']}."
            )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._rest = self._order()
        for _ in range(self._position):
            if next(self._rest, None) is None:
                raise RunError(
                    f"The checkpoint has seen {self._position} prompts of an epoch, but the data holds fewer now; "
                    "resume with the data the run was started with."
                )

    def _take(self) -> EncodedPrompt:
        if self._rest is None:
            self._rest = self._order()
        taken = next(self._rest, None)
        if taken is None:
            if self._position == 0:
                raise DataError("The streamed prompts ran out at once: the data has become empty.")
            self._epoch, self._position = self._epoch + 1, 0
            self._rest = None
            return self._take()
        self._position += 1
        return taken

    def _order(self) -> Iterator[EncodedPrompt]:
        """Iterate over the present epoch's prompts in its order."""
        generator = random.Random(f"{self._seed}/{self._epoch}")  # a text seed is hashed the same in every process
        if self._prompts.reopen is not None:
            return _shuffled(self._prompts.reopen(), generator)
        order = list(range(len(self._prompts.prompts)))
        generator.shuffle(order)
        return (self._prompts.prompts[index] for index in order)


def _shuffled(prompts: Iterator[EncodedPrompt], generator: random.Random) -> Iterator[EncodedPrompt]:
    """Shuffle a stream within a buffer: each prompt read takes the place of one drawn at random."""
    buffer: list[EncodedPrompt] = []
    for prompt in prompts:
        if len(buffer) < BUFFER_ROWS:
            buffer.append(prompt)
            continue
        index = generator.randrange(BUFFER_ROWS)
        drawn, buffer[index] = buffer[index], prompt
        yield drawn
    generator.shuffle(buffer)
    yield from buffer
