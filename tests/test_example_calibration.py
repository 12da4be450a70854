"""The example that holds calibrated weights against reward models: folds by prompt, and its table by hand."""

from __future__ import annotations

import numpy as np
import pytest
from examples.e2e.calibration import Choice, folds, table


def test_a_prompt_is_in_one_fold():
    prompts = [f"p{number % 9}" for number in range(60)]
    found = folds(prompts, 4)
    assert set(found) == {0, 1, 2, 3}
    for prompt in set(prompts):
        assert len({int(one) for one, own in zip(found, prompts, strict=True) if own == prompt}) == 1


def test_the_table_by_hand():
    """Three pairs of two prompts: agreement is a mean over prompts, differences are paired by them."""
    same = np.zeros((1, 5))
    choices = [
        Choice("start", 0, np.array([1.0, 1.0, 0.0]), same + 0.5, same + 0.2),
        Choice("start, calibrated", 50, np.array([1.0, 1.0, 1.0]), same + 0.75, same + 0.2),
        Choice("start, calibrated, asked", 50, np.array([1.0, 0.0, 1.0]), same + 0.75, same + 0.2),
        Choice("a reward model", 800, np.array([0.0, 0.0, 1.0]), same + 0.25, same + 0.3),
    ]
    truth = {"missed": np.array([[0.5, 0.0], [0.5, 1.0]]), "added": np.zeros((2, 2))}
    text = table(choices, ["a", "a", "b"], truth)
    rows = {cells[1].strip(): cells for line in text.splitlines() if (cells := line.split("|"))[1:]}
    assert rows["start"][3].strip().startswith("0.500")
    assert rows["start, calibrated, asked"][3].strip().startswith("0.750")  # (1/2 + 1) / 2
    assert rows["start, calibrated less a reward model"][2].strip().startswith("+0.500")
    assert rows["start, calibrated less start"][3].strip() == "+0.250 [+0.250, +0.250]"
    assert rows["start, calibrated, asked less start, calibrated"][2].strip().startswith("-0.250")
    assert "start less start" not in text
    assert "of all sampled answers 0.500 of the facts are said, by the best of eight 0.750" in text.lower()
    assert pytest.approx(float(rows["a reward model"][5].split()[0])) == 0.3
