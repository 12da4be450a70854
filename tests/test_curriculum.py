"""Which prompts come next: groups without spread are passed over, and a bandit goes where there is most to learn."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from cagsr.commands.main import main
from cagsr.config import CurriculumConfig
from cagsr.errors import ConfigError, RunError
from cagsr.flow import EncodedPrompt, Prompt, Returns
from cagsr.prompts.salience import DocumentFrequency
from cagsr.prompts.stream import PromptSet
from cagsr.prompts.tf_idf import tf_idf
from cagsr.training.curriculum import SelfPaced, SkipFlat, build_curriculum, cluster_prompts, spreads

PACED = CurriculumConfig(kind="self_paced", clusters=2)


def prompt_set(texts: list[str]) -> PromptSet:
    prompts = [EncodedPrompt(Prompt(row, text), (1,), (0,), (1.0,)) for row, text in enumerate(texts, 1)]
    return PromptSet(prompts, DocumentFrequency.fit([one.prompt for one in prompts]))


def worth(spread: list[float]) -> Returns:
    """Two answers to each prompt, so far apart that this is their deviation."""
    total = torch.tensor([[-one, one] for one in spread]).flatten()
    return Returns(total, total[:, None], total[:, None], {}, {})


def alone(found: list[Any]) -> list[Any]:
    return list(found)


def rows(dealt: list[EncodedPrompt]) -> list[int]:
    return [encoded.prompt.row for encoded in dealt]


def test_spreads_by_hand():
    assert spreads(worth([0.0, 2.0, 0.5]), 3) == [0.0, 2.0, 0.5]


def test_what_was_flat_is_left_out_of_the_next_epoch_and_asked_again_after_it():
    stream = SkipFlat(prompt_set(list("abcd")), 2, 0, 0, 1, alone)
    flat = {1, 3}

    def epoch(batches: int) -> list[int]:
        found = []
        for _ in range(batches):
            dealt = stream.next()
            stream.observe(dealt, worth([0.0 if row in flat else 1.0 for row in rows(dealt)]))
            found += rows(dealt)
        return found

    assert sorted(epoch(2)) == [1, 2, 3, 4]
    assert sorted(epoch(1)) == [2, 4]
    flat.clear()
    assert sorted(epoch(2)) == [1, 2, 3, 4]
    assert sorted(epoch(2)) == [1, 2, 3, 4]


def test_where_all_were_flat_all_are_asked_again():
    stream = SkipFlat(prompt_set(list("ab")), 2, 0, 0, 1, alone)
    for _ in range(3):
        dealt = stream.next()
        assert sorted(rows(dealt)) == [1, 2]
        stream.observe(dealt, worth([0.0, 0.0]))


def paced(
    config: CurriculumConfig = PACED, batch: int = 2, process: int = 0, processes: int = 1, gather: Any = alone
) -> SelfPaced:
    cluster = np.array([0, 0, 0, 1, 1, 1])
    return SelfPaced(prompt_set(list("abcdef")), cluster, config, batch, 3, process, processes, gather)


def test_every_arm_is_tried_and_then_the_one_that_pays():
    bandit = paced(CurriculumConfig(kind="self_paced", clusters=2, exploration=0.0, memory=0.5))
    first = bandit.next()
    assert {row <= 3 for row in rows(first)} == {True, False}  # one of each arm
    bandit.observe(first, worth([0.1 if row <= 3 else 1.0 for row in rows(first)]))
    assert [value for _, _, value in bandit.arms] == [pytest.approx(0.1), pytest.approx(1.0)]
    second = bandit.next()
    assert all(row > 3 for row in rows(second))
    # An epoch of an arm has each of its prompts once.
    third = bandit.next()
    bandit.observe(third, worth([0.05, 0.05]))
    shown = [row for row in [*rows(first), *rows(second), *rows(third)] if row > 3]
    assert sorted(shown[:3]) == [4, 5, 6]
    # What it paid lately counts for half: 0.5 * 1.0 + 0.5 * 0.05.
    assert bandit.arms[1][2] == pytest.approx(0.525)


def test_the_bound_of_an_arm_by_hand():
    bandit = paced(CurriculumConfig(kind="self_paced", clusters=2, exploration=1.0))
    bandit._value, bandit._drawn = [0.5, 1.0], [2, 30]
    # 0.5 / 1 + sqrt(ln 32 / 2) = 1.816 against 1 + sqrt(ln 32 / 30) = 1.340
    assert 0.5 + math.sqrt(math.log(32) / 2) > 1.0 + math.sqrt(math.log(32) / 30)
    assert bandit._best() == 0
    bandit._drawn = [20, 12]  # 0.5 + 0.416 against 1 + 0.537
    assert bandit._best() == 1


@pytest.mark.parametrize("kind", ["skip_flat", "self_paced"])
def test_a_curriculum_that_goes_on_deals_what_the_uninterrupted_one_does(kind: str):
    def made() -> Any:
        if kind == "self_paced":
            return paced()
        return SkipFlat(prompt_set(list("abcdef")), 2, 3, 0, 1, alone)

    def played(stream: Any, steps: int) -> list[int]:
        found = []
        for _ in range(steps):
            dealt = stream.next()
            stream.observe(dealt, worth([(row % 3) / 2 for row in rows(dealt)]))
            found += rows(dealt)
        return found

    whole, first, second = made(), made(), made()
    expected = played(whole, 9)
    begun = played(first, 4)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + played(second, 5) == expected
    with pytest.raises(RunError, match=r"another --curriculum\.kind"):
        made().load_state_dict({"seed": 3})
    with pytest.raises(RunError, match=r"resume with --run\.seed 4"):
        made().load_state_dict({**first.state_dict(), "seed": 4})


@pytest.mark.parametrize("kind", ["skip_flat", "self_paced"])
def test_two_processes_deal_what_one_does(kind: str):
    """Each sees its own answers; what they learn of them is gathered."""
    mailbox: list[list[float]] = [[], []]

    def made(batch: int, process: int, processes: int, gather: Any) -> Any:
        if kind == "self_paced":
            return paced(batch=batch, process=process, processes=processes, gather=gather)
        return SkipFlat(prompt_set(list("abcdef")), batch, 3, process, processes, gather)

    single = made(2, 0, 1, alone)
    both = [made(1, process, 2, lambda found: [*mailbox[0], *mailbox[1]]) for process in (0, 1)]
    for _ in range(8):
        dealt = single.next()
        parts = [stream.next() for stream in both]
        assert rows(dealt) == rows(parts[0]) + rows(parts[1])
        returns = [worth([(row % 3) / 2 for row in rows(part)]) for part in parts]
        for process in (0, 1):
            mailbox[process] = spreads(returns[process], 1)
        for stream, part, own in zip(both, parts, returns, strict=True):
            stream.observe(part, own)
        single.observe(dealt, worth([(row % 3) / 2 for row in rows(dealt)]))


def test_prompts_of_a_kind_are_a_cluster():
    texts = [f"the price of {thing} is low" for thing in ("bread", "milk", "wine", "beer")]
    texts += [f"a song by {name} about love" for name in ("Ann", "Bob", "Cyd", "Dan")]
    found = prompt_set(texts)
    cluster = cluster_prompts(found.prompts, found.frequency, PACED, seed=0)
    assert len(set(cluster[:4])) == len(set(cluster[4:])) == 1
    assert cluster[0] != cluster[4]
    lengths = np.sqrt((tf_idf(texts, found.frequency).toarray() ** 2).sum(axis=1))
    np.testing.assert_allclose(lengths, 1.0)


def test_how_much_there_is_to_say_tells_clusters_apart():
    prompts = [EncodedPrompt(Prompt(row, "say it"), (1,), (0,), (1.0,) * (1 if row < 4 else 40)) for row in range(8)]
    cluster = cluster_prompts(prompts, DocumentFrequency(1, {}), PACED, seed=1)
    assert len(set(cluster[:4])) == len(set(cluster[4:])) == 1
    assert cluster[0] != cluster[4]


def test_what_can_not_be_clustered_is_refused():
    found = prompt_set(["a b", "c d"])
    with pytest.raises(ConfigError, match="there are 2 prompts; ask for fewer clusters"):
        build_curriculum(CurriculumConfig(kind="self_paced", clusters=3), found, 1, 0, 0, 1, alone)
    streamed = PromptSet(found.prompts, found.frequency, reopen=lambda: iter(found.prompts))
    with pytest.raises(ConfigError, match=r"leave --data\.streaming out"):
        build_curriculum(CurriculumConfig(kind="skip_flat"), streamed, 1, 0, 0, 1, alone)


@pytest.mark.parametrize("kind", ["skip_flat", "self_paced"])
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, tmp_path: Path):
    tiny.save_model(tmp_path / "start")
    tiny.save_prompts(tmp_path / "rows.jsonl")

    def flags(name: str, steps: int) -> list[str]:
        given = {
            "--model": tmp_path / "start", "--model.device": "cpu", "--data": tmp_path / "rows.jsonl",
            "--output_dir": tmp_path / name, "--steps": steps, "--run.batch_size": 2, "--num_generations": 2,
            "--max_new_tokens": 4, "--evaluation.held_out": 2, "--ppo.estimator": "rloo", "--curriculum.kind": kind,
            "--curriculum.clusters": 3, "--salience.weighting": "uniform",
        }  # fmt: skip
        return ["train", *(str(part) for pair in given.items() for part in pair)]

    assert main(flags("whole", 6)) == 0
    assert main(flags("parts", 3)) == 0
    assert main([*flags("parts", 6), "--resume"]) == 0
    assert (tmp_path / "parts" / "samples.jsonl").read_text() == (tmp_path / "whole" / "samples.jsonl").read_text()
