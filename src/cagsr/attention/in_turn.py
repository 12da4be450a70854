"""One reading over several forwards that run one after the other: the prompts first, then their answers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType

from torch import Tensor, nn

from cagsr.attention.intercept import Intercepted, listening
from cagsr.attention.reader import PromptAttentionReader
from cagsr.attention.region import AttentionRegion


class ReadingsInTurn:
    """Readings of consecutive forwards of one model, each with its own region, in one ``with`` block.

    Args:
        reader: which layers and heads.
        regions: one for each forward, in the order in which they run.
        with_gradients: as in ``PromptAttentionReader.read``.
    """

    def __init__(
        self, reader: PromptAttentionReader, regions: Sequence[AttentionRegion], with_gradients: bool = False
    ) -> None:
        self._readings = [reader.read(region, with_gradients) for region in regions]
        self._turn = 0
        self._stack = ExitStack()

    def __enter__(self) -> ReadingsInTurn:
        first = self._readings[0]
        self._stack.enter_context(listening(first.modules, self._hear, logsumexp=not first.with_gradients))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def attention(self) -> list[Tensor]:
        """``(n, response, prompt)`` float32 of each forward, as ``Reading.attention`` gives it.

        Raises:
            AttentionError: a forward has not run, or not whole.
        """
        return [reading.attention for reading in self._readings]

    def _hear(self, module: nn.Module, call: Intercepted) -> None:
        # The last forward keeps the turn: one more of it is an error, and its layers may run again in a backward pass.
        if self._readings[self._turn].complete and self._turn + 1 < len(self._readings):
            self._turn += 1
        self._readings[self._turn].hear(module, call)
