"""Exponential variates: torch's own numbers, whichever rows are wanted, and its generator left where torch leaves it."""

from __future__ import annotations

import pytest
import torch

from cagsr.rollout import variates
from cagsr.rollout.variates import exponential_variates


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("held", [[0, 1, 2, 3, 4, 5, 6], [0, 3, 6], [5], [2, 3]])
def test_they_are_torchs_and_so_is_what_is_drawn_next(
    held: list[int], own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variates, "AT_ONCE", 2 * 5003 + 1)  # two rows at a time
    if not own:
        monkeypatch.setattr(variates, "_same_numbers", lambda: False)
    torch.manual_seed(3)
    expected = torch.empty(7, 5003).exponential_()[held]
    after = torch.rand(5)
    torch.manual_seed(3)
    assert torch.equal(exponential_variates(7, torch.tensor(held), 5003), expected)
    assert torch.equal(torch.rand(5), after)


def test_torchs_own_is_called_where_its_numbers_are_made_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    variates._same_numbers.cache_clear()
    with monkeypatch.context() as other:
        other.setattr(variates, "_exponential", lambda uniform: uniform.log_().neg_())  # as good, but not torch's
        assert not variates._same_numbers()
    variates._same_numbers.cache_clear()
