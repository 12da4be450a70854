"""Validity against size: the partial correlation by hand, and a whole run on a decoder and an encoder-decoder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from examples.e2e import validity_by_size as validity

import tiny
from cagsr.diagnosis.best_of_n import correlation
from cagsr.errors import ConfigError
from cagsr.view.measure import Plane


def test_partial_is_the_correlation_of_what_length_leaves():
    rng = np.random.default_rng(0)
    x, y, z = rng.normal(size=(3, 40, 8))
    x, y = x + z, y - 0.5 * z + 0.3 * x
    truths = validity.Truths(y, x, z)

    def residual(values: np.ndarray) -> np.ndarray:
        a, b = (one - one.mean(axis=1, keepdims=True) for one in (values, z))
        return a - b * (a * b).sum() / (b * b).sum()

    found = validity.numbers_of(x, truths)
    assert found["partial"] == pytest.approx(correlation(residual(x), residual(y)), abs=1e-6)
    assert (found["said"], found["length"]) == (correlation(x, y), correlation(x, z))
    assert validity.numbers_of(z, truths)["partial"] == 0.0


def test_a_layer_is_the_mean_of_its_heads():
    read = {Plane(3, head): torch.full((1, 2, 3), float(head)) for head in range(3)}
    assert torch.equal(validity.with_layer_means(read)[Plane(3, None)], torch.ones(1, 2, 3))


def test_a_whole_run(tmp_path: Path):
    prompts = tmp_path / "prompts.jsonl"
    meanings = [
        f"name: {a} {b} | area: {c} =>" for a in ("red", "big") for b in tiny.WORDS[2:6] for c in tiny.WORDS[:3]
    ]
    prompts.write_text("".join(json.dumps({"prompt": meaning}) + "\n" for meaning in meanings))
    models = []
    for kind in ("llama", "bart"):
        tiny.save_model(tmp_path / kind, kind)
        models.append(f"{kind}={tmp_path / kind}={prompts}")
    options = validity.Options(
        tuple(models), tmp_path / "found", prompts=3, candidates=3, max_new_tokens=12, associations=30
    )
    validity.main(options)
    found = json.loads((tmp_path / "found.json").read_text())["models"]
    for one in found:
        assert {"coverage", "grounded_coverage", "associated_coverage", "length"} <= set(one["terms"])
        assert one["terms"]["length"]["length"] == pytest.approx(1.0)
        # two layers of four heads, and each layer's mean
        assert sorted((head["layer"], head["head"]) for head in one["heads"]) == [
            (layer, head) for layer in range(2) for head in range(-1, 4)
        ]
        assert all((head["copying"] is None) == (head["head"] < 0) for head in one["heads"])
    assert "| facts said, length held fixed | llama | bart |" in (tmp_path / "found.md").read_text()
    assert "<svg" in (tmp_path / "found.svg").read_text()
    with pytest.raises(ConfigError, match="write LABEL=FOLDER=PROMPTS"):
        validity.parts_of("llama")
