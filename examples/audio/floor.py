"""A random reward, the floor of a comparison: what training by any reward does."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any


def random_reward(
    prompts: Sequence[str], completions: Sequence[str], audio: Sequence[str], **columns: Any
) -> list[float]:
    """A number between 0 and 1 that says nothing, the same for the same clip and transcript."""
    said = [f"{clip}\0{text}".encode() for clip, text in zip(audio, completions, strict=True)]
    return [int.from_bytes(hashlib.blake2b(one, digest_size=8).digest(), "big") / 2**64 for one in said]
