"""The signals of the example by hand: lookback's residual, weights of heads, words and their doubts; then a tiny run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples.e2e import signal_formulas as formulas
from examples.e2e import signal_table, signals
from examples.e2e.signal_answers import best_weights, words_of

import tiny
from cagsr.diagnosis.best_of_n import correlation, oracle_share
from cagsr.errors import ConfigError

MASK = torch.tensor([[True, True, True], [True, True, False]])


def test_copying_rate_counts_what_can_be_copied():
    prompt_ids = torch.tensor([[1, 7, 8]])  # the first token is the sink
    said = torch.tensor([[7, 8, 9, 7]])  # 9 stands nowhere in the prompt; the last token is padding
    mask = torch.tensor([[True, True, True, False]])
    usable = torch.tensor([[False, True, True]])
    copies = torch.tensor([[0.8, 0.2, 0.0], [0.8, 0.05, 0.15], [0.0, 0.5, 0.5], [0.0, 1.0, 0.0]])
    wrong = torch.tensor([[0.0, 0.4, 0.6], [0.0, 0.2, 0.8], [0.0, 0.5, 0.5], [0.0, 1.0, 0.0]])
    rate = formulas.copying_rate(torch.stack([copies, wrong])[:, None], said, mask, prompt_ids, usable)
    # The first head copies 7 and 8 although the sink has more; the second looks at 8 while 7 is said.
    assert rate.tolist() == [1.0, 0.5]
    nothing = formulas.copying_rate(copies[None, None], torch.full((1, 4), 9), mask, prompt_ids, usable)
    assert nothing.tolist() == [0.0]


def test_head_weights():
    assert formulas.head_weights(torch.tensor([0.1, -0.5, 0.3])).tolist() == pytest.approx([0.25, 0.0, 0.75])
    assert formulas.head_weights(torch.tensor([-0.1, -0.5])).tolist() == [0.5, 0.5]
    assert best_weights(torch.tensor([-0.3, -0.1, -0.2])).tolist() == [0.0, 1.0, 0.0]


def test_prompt_mass_with_and_without_the_sink():
    heads = torch.tensor([[[[0.5, 0.2, 0.1], [0.4, 0.0, 0.3], [0.1, 0.1, 0.1]]]])
    mask = torch.tensor([[True, True, False]])
    assert formulas.prompt_mass(heads, mask)[0, 0].tolist() == pytest.approx([0.8, 0.7, 0.0])
    bare = formulas.prompt_mass(heads, mask, sink=torch.tensor([0]))
    assert bare[0, 0].tolist() == pytest.approx([0.3 / 0.5, 0.3 / 0.6, 0.0])


def test_expected_by_position_ignores_padding_and_carries_on():
    values = torch.tensor([[[1.0, 0.6, 0.2], [0.8, 0.4, 99.0]]])
    expected = formulas.expected_by_position(values, MASK, "mean", 5)
    assert expected[0].tolist() == pytest.approx([0.9, 0.5, 0.2, 0.2, 0.2])


@pytest.mark.parametrize(("how", "shape"), [("linear", lambda t: t), ("log", lambda t: math.log(1 + t))])
def test_expected_by_position_finds_the_line(how: Any, shape: Any):
    values = torch.tensor([[[0.9 - 0.1 * shape(t) for t in range(3)]] * 2])
    values[0, 1, 2] = 99.0
    expected = formulas.expected_by_position(values, MASK, how, 6)
    assert expected[0].tolist() == pytest.approx([0.9 - 0.1 * shape(t) for t in range(6)], abs=1e-6)


def test_a_residual_does_not_grow_with_length():
    """Two answers that follow the expectation to the letter: lookback differs by length, the residual doesn't."""
    curve = torch.tensor([1.0, 0.8, 0.5])
    values = (curve * MASK)[None]
    expected = curve.double()[None]
    plain = formulas.mean_residual(values, MASK, torch.zeros(1, 3))
    assert plain[0].tolist() == pytest.approx([2.3 / 3, 0.9])
    assert formulas.mean_residual(values, MASK, expected)[0].tolist() == pytest.approx([0.0, 0.0], abs=1e-7)
    raised = formulas.mean_residual((values + 0.1) * MASK, MASK, expected)
    assert raised[0].tolist() == pytest.approx([0.1, 0.1])


def test_probe_finds_the_head_that_knows():
    generator = np.random.default_rng(0)
    heads = generator.normal(size=(3, 20, 8))
    heads[2] = 5.0  # a head that never varies
    target = 2 * heads[0] + generator.normal(size=(20, 1))  # what differs between prompts is nobody's business
    weights = formulas.probe_weights(heads, target, ridge=1e-9)
    # The target has the standard deviation of 2 heads[0], so its z-score is heads[0] over its own deviation.
    within = formulas.within_centred(heads[0])
    assert weights == pytest.approx([1 / within.std(), 0.0, 0.0], abs=1e-6)
    assert formulas.probe_weights(heads, np.ones((20, 8))).tolist() == [0.0, 0.0, 0.0]


def test_slope_within_prompts():
    over = np.array([[1.0, 2.0, 3.0], [10.0, 11.0, 12.0]])
    values = np.array([[5.0, 7.0, 9.0], [0.0, 2.0, 4.0]])  # the second prompt lies lower
    assert formulas.slope(values, over) == pytest.approx(2.0)
    assert formulas.slope(values, np.ones((2, 3))) == 0.0


def test_word_doubts_by_hand():
    attention = torch.tensor([[0.0, 0.6, 0.2], [0.5, 0.25, 0.25], [0.1, 0.05, 0.0]])
    same = torch.tensor([[False, True, False], [False, False, False], [False, True, False]])
    salient = torch.tensor([False, True, True])
    logprobs = torch.tensor([-0.1, -2.0, -3.0])
    found = formulas.word_doubts(attention, same, salient, logprobs, [[0], [1], [2]], threshold=0.1)
    # The first word is copied; the second looks evenly at both salient tokens; the third is an equal token, hardly seen.
    assert found["words not copied"] == pytest.approx(2 / 3)
    assert found["words not in the prompt"] == pytest.approx(1 / 3)
    assert found["entropy, worst word"] == pytest.approx(1.0)
    assert found["entropy, mean"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["peak, worst word"] == pytest.approx(0.95)
    assert found["peak, mean"] == pytest.approx((0.75 + 0.95) / 3)
    assert found["surprise, worst word"] == pytest.approx(3.0)
    assert found["surprise, mean"] == pytest.approx(5 / 3)
    assert set(formulas.word_doubts(attention, same, salient, logprobs, [], 0.1).values()) == {0.0}


def test_sibling_support_by_hand():
    answers = [["cheap", "pub", "the"], ["cheap", "pub"], ["cheap", "french"]]
    weight = {"cheap": 1.0, "pub": 2.0, "french": 3.0}
    (agreed, whole), _, (last, rest) = formulas.sibling_support(answers, weight)
    assert agreed == pytest.approx((1 * 1 + 2 * 0.5) / 3)
    assert whole == pytest.approx((1 + 1) / (1 + 1 + 3 * 0.5))
    assert last == pytest.approx(1 / 4)  # cheap by both, french by nobody else
    assert rest == pytest.approx(1 / (1 + 2 * 1))
    assert formulas.sibling_support([["the"], ["the"]], weight) == [(0.0, 0.0), (0.0, 0.0)]


def test_words_of_an_answer_leave_out_special_tokens():
    pieces = [" A", "rom", "i", " is", " cheap", ".", "<eos>"]
    assert words_of(pieces, " Aromi is cheap.") == (("aromi", (0, 1, 2)), ("is", (3,)), ("cheap", (4,)))
    assert words_of(pieces, "Aromi is cheap.") == words_of(pieces, " Aromi is cheap.")
    assert words_of(["<eos>"], "") == ()


def test_one_model_gives_what_the_library_gives():
    generator = np.random.default_rng(1)
    truth = signal_table.Truths(
        generator.random((30, 8)).round(1), generator.random((30, 8)), generator.random((30, 8))
    )
    signal = truth.said + generator.normal(size=(30, 8))
    row = signal_table.measure([({"x": signal}, truth)])["x"]
    assert row.said.mean == pytest.approx(correlation(signal, truth.said))
    assert row.added.mean == pytest.approx(correlation(signal, truth.added))
    assert row.share.mean == pytest.approx(oracle_share(signal, truth.said).mean)
    assert row.said.low < row.said.mean < row.said.high
    flat = signal_table.measure([({"x": np.ones((30, 8))}, truth)])["x"]
    assert (flat.said.mean, flat.said.low) == (0.0, 0.0)
    assert flat.share.mean == pytest.approx(0.0)


def test_intervals_span_models():
    """Two models that disagree: no prompt explains it, the draw of models does."""
    generator = np.random.default_rng(2)
    said = generator.random((40, 8))
    truth = signal_table.Truths(said, said, said)
    row = signal_table.measure([({"x": said}, truth), ({"x": -said}, truth)])["x"]
    assert row.said.mean == pytest.approx(0.0)
    assert (row.said.low, row.said.high) == pytest.approx((-1.0, 1.0))
    assert [values[0] for values in row.by_model] == pytest.approx([1.0, -1.0])


def test_differences_are_paired():
    """Noise that both signals share drops out: the difference is known better than either."""
    generator = np.random.default_rng(3)
    truth = signal_table.Truths(generator.random((60, 8)), np.zeros((60, 8)), generator.random((60, 8)))
    noise = generator.normal(size=(60, 8))
    models = [({"a": truth.said + noise, "b": 0.9 * truth.said + noise, "c": truth.said + 1 + noise}, truth)]
    less = signal_table.difference(models, "a", "b").said
    rows = signal_table.measure(models)
    assert less.mean == pytest.approx(rows["a"].said.mean - rows["b"].said.mean)
    assert 0 < less.low < less.high < rows["a"].said.high - rows["a"].said.low
    same = signal_table.difference(models, "a", "c")
    assert (same.said.low, same.said.high, same.net_share.high) == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)


def test_sum_names():
    assert signals.sum_name(((1.0, "a"), (0.5, "- b"), (0.5, "c"))) == "sum: a - 0.5 b + 0.5 c"
    assert signals.sum_name(((1.0, "- b"), (1.0, "c"))) == "sum: - b + c"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    for seed in (0, 1):
        tiny.save_model(tmp_path / f"start-seed{seed}", seed=seed)
    values = ("cat", "dog", "bird", "house", "tree", "red", "blue", "green")
    prompts = [f"name: {a} | food: {b} | area: {c} =>" for a in values for b in values for c in values[:2] if a != b]
    rows = [json.dumps({"prompt": text}) + "\n" for text in [*prompts, *prompts[:10]]]
    (tmp_path / "unlabelled.jsonl").write_text("".join(rows))
    return tmp_path


def small(work: Path, **settings: Any) -> signals.Options:
    given: dict[str, Any] = {
        "work": work,
        "starts": ("start-seed0", "start-seed1"),
        "prompts": 6,
        "calibration": 5,
        "associations": 40,
        "candidates": 3,
        "max_new_tokens": 8,
        "batch_size": 4,
    }
    return signals.Options(**(given | settings))


def test_tiny_run(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    asked: list[set[str]] = []

    def spy(name: str) -> None:
        real = getattr(signals, name)

        def wrapped(loaded: Any, prompts: Any, *rest: Any, **named: Any) -> Any:
            asked.append({one.prompt.text for one in prompts})
            return real(loaded, prompts, *rest, **named)

        monkeypatch.setattr(signals, name, wrapped)

    spy("associations_of")
    spy("read_answers")
    signals.main(small(work))
    learned, measured, calibrated = asked[:3]
    assert (len(learned), len(measured), len(calibrated)) == (40, 6, 5)
    assert not learned & measured
    assert not learned & calibrated
    assert not measured & calibrated
    assert asked[3:] == asked[:3]  # the same prompts for every model: intervals pair them
    numbers = json.loads((work / "signals.json").read_text())
    names = set(numbers["signals"])
    assert {"- unsupported", "lookback, heads by probe", "grounded, heads by copying", "- words not copied"} <= names
    assert len([name for name in names if name.startswith("sum: ")]) == len(signals.SUMS)
    for row in numbers["signals"].values():
        for name in ("said", "added", "length", "share", "net_share"):
            assert all(math.isfinite(value) for value in row[name].values())
    assert numbers["signals"]["length"]["length"]["mean"] == pytest.approx(1.0)
    assert len(numbers["heads"]["start-seed1"]["copying"]) == 2 * 4
    assert [(row["signal"], row["less"]) for row in numbers["differences"]] == list(signals.PAIRS)
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in names)


def test_too_few_prompts_is_one_sentence(work: Path):
    with pytest.raises(ConfigError, match=r"has 112 different prompts and 121 are needed: lower --associations\."):
        signals.main(small(work, associations=110))
