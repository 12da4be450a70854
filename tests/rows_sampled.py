"""How many answers are sampled together, whoever asks for them."""

from functools import wraps
from typing import Any

import pytest
from torch import Tensor

from cagsr.rollout import sample


def rows_sampled_at_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list to which every call of the decoding loop adds the number of its answers."""
    rows: list[int] = []
    decode = sample.decode

    @wraps(decode)  # generate reads its signature
    def counted(model: Any, input_ids: Tensor, *rest: Any, answers_per_prompt: int, **more: Any) -> Tensor:
        rows.append(len(input_ids) * answers_per_prompt)
        return decode(model, input_ids, *rest, answers_per_prompt=answers_per_prompt, **more)

    monkeypatch.setattr(sample, "decode", counted)
    return rows
