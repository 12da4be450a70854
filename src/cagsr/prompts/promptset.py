"""A set of encoded prompts: what the rest of the program trains on, evaluates and ranks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from cagsr.errors import ConfigError
from cagsr.flow import EncodedPrompt
from cagsr.prompts.salience import DocumentFrequency


@dataclass(frozen=True)
class PromptSet:
    """Encoded prompts, with how their words were weighted and what was noted on the way."""

    prompts: Sequence[EncodedPrompt]
    """All prompts; of a streamed set the first ones only (for evaluation and inspection)."""
    frequency: DocumentFrequency
    """The document frequencies behind the IDF weights; keep them with a run to score new prompts alike."""
    notes: tuple[str, ...] = ()
    """One sentence each about what was chosen, dropped or estimated."""
    reopen: Callable[[], Iterator[EncodedPrompt]] | None = None
    """Only of a streamed set: starts reading all its prompts from the file; None: ``prompts`` are all."""

    def split(self, held_out: int, seed: int) -> tuple[PromptSet, PromptSet]:
        """Take ``held_out`` prompts off for evaluation: ``(training, held-out)``.

        They are drawn at random with ``seed``, and with them goes every other row of the same prompt text, so that
        no held-out prompt is trained on; of a streamed set the first ``held_out`` rows are taken (a stream can't be
        drawn from), whatever the seed.

        Raises:
            ConfigError: no prompt would be left to train on.
        """
        if held_out <= 0:
            return self, replace(self, prompts=(), reopen=None)
        if self.reopen is not None:
            return self._split_stream(held_out)
        order = list(range(len(self.prompts)))
        random.Random(seed).shuffle(order)
        chosen: dict[str, int] = {}  # one row for each text, so that the evaluation does not repeat itself
        for index in order:
            if len(chosen) == held_out:
                break
            chosen.setdefault(self.prompts[index].prompt.text, index)
        training = [encoded for encoded in self.prompts if encoded.prompt.text not in chosen]
        if not training:
            raise ConfigError(
                f"--evaluation.held_out {held_out} leaves no prompt to train on (there are {len(self.prompts)} rows); "
                "lower it, or name held-out prompts with --evaluation.path."
            )
        held = [self.prompts[index] for index in sorted(chosen.values())]
        return replace(self, prompts=training), replace(self, prompts=held)

    def _split_stream(self, held_out: int) -> tuple[PromptSet, PromptSet]:
        reopen = self.reopen
        assert reopen is not None
        if held_out >= len(self.prompts):
            raise ConfigError(
                f"--evaluation.held_out {held_out} is more than the first {len(self.prompts)} rows that a streamed set "
                "can hold out; lower it, or name held-out prompts with --evaluation.path."
            )
        training = replace(self, prompts=self.prompts[held_out:], reopen=lambda: islice(reopen(), held_out, None))
        return training, replace(self, prompts=self.prompts[:held_out], reopen=None)
