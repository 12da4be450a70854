"""The parts of a server by themselves: what is written, kept, decided, put in place."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from cagsr.config import ModelConfig, MonitorConfig
from cagsr.config.validation import validate
from cagsr.errors import ConfigError, DataError, RunError
from cagsr.evaluation.intervals import Interval
from cagsr.models.load import load_model
from cagsr.preferences.pairs import count_pairs
from cagsr.prompts.prepare import encode_texts
from cagsr.serving.compare_versions import Compared, Measured, reasons_against
from cagsr.serving.engine import Asked, Job, sampled
from cagsr.serving.pairs import thumb_pairs
from cagsr.serving.prompt_store import PromptStore, RatedAnswer, is_held_out
from cagsr.serving.protocol import ApiError, ChatRequest, CompletionRequest, parsed
from cagsr.serving.settings import ConsentConfig, ServeConfig
from cagsr.serving.versions import Versions
from cagsr.serving.writing import Piece, Writing

# ---- an answer while it is written ----


def _writing(**more: Any) -> tuple[Writing, list[Piece]]:
    """An answer of letters: token 1 is a, 2 is b ...; 0 ends it."""
    said: list[Piece] = []
    letter = lambda number: chr(96 + number)  # noqa: E731
    given: dict[str, Any] = {"stop": (), "max_tokens": 9, "say": said.append, **more}
    return Writing(0, lambda ids: "".join(map(letter, ids)), letter, frozenset({0}), **given), said


def test_a_stop_string_is_never_shown_not_even_its_beginning() -> None:
    writing, said = _writing(stop=("bcd",))
    for token in (1, 2, 3, 1, 2, 3, 4, 5):
        writing.add(token)
    # a | ab: held back | abc: held back | abca: sure | ... | abcabcd: cut before the stop string
    assert [(piece.text, piece.finish) for piece in said] == [("a", None), ("bca", None), ("", "stop")]
    assert (writing.text, writing.ids, writing.finish) == ("abca", [1, 2, 3, 1, 2, 3, 4], "stop")


def test_an_answer_ends_at_its_own_length_and_says_all_that_was_held_back() -> None:
    writing, said = _writing(stop=("bcd",), max_tokens=2)
    for token in (1, 2, 3):
        writing.add(token)
    assert [(piece.text, piece.finish) for piece in said] == [("a", None), ("b", "length")]
    assert writing.response().ids == (1, 2)
    assert not writing.response().ended


def test_chances_belong_to_the_text_that_is_left() -> None:
    writing, said = _writing(stop=("c",), top=1)
    chances = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    for token in (1, 2, 3):
        writing.add(token, chances)
    assert [(one.token, one.start) for one in writing.chances] == [("a", 0), ("b", 1)]
    assert writing.chances[0].logprob == pytest.approx(torch.tensor(0.2).log().item())
    assert writing.chances[0].top[0][0] == "c"
    assert [one.token for piece in said for one in piece.chances] == ["a", "b"]


def test_half_a_character_waits_for_its_other_half() -> None:
    said: list[Piece] = []
    texts = {1: "x\ufffd", 2: "xé"}
    writing = Writing(0, lambda ids: texts[len(ids)], str, frozenset(), (), 9, say=said.append)
    writing.add(5)
    writing.add(6)
    assert [piece.text for piece in said] == ["x", "é"]


# ---- batches ----


def test_an_answer_is_the_same_alone_and_among_others(tmp_path: Path) -> None:
    loaded = load_model(ModelConfig(str(tiny.save_model(tmp_path / "model")), device="cpu"), for_training=False)
    prompts = encode_texts(
        ["tell me about the red cat", "the dog sees a tree near the house ."],
        loaded.tokenizer,
        ServeConfig().salience,
        60,
    )
    jobs = [
        Job(Asked(prompt, 0, 2, 2, 1.0, 0.9, most, stop, seed, 0, False), lambda event: None)
        for prompt, most, stop, seed in zip(prompts, (3, 9), ((), ("the",)), (5, 6), strict=True)
    ]
    together = [[(one.ids, one.text, one.finish) for one in rows] for rows in sampled(loaded, jobs)]
    alone = [[(one.ids, one.text, one.finish) for one in sampled(loaded, [job])[0]] for job in jobs]
    assert together == alone
    assert together[0][0][0] != together[0][1][0]  # each answer has luck of its own
    assert all(len(ids) <= 3 for ids, _, _ in together[0])
    again = replace(jobs[0], asked=replace(jobs[0].asked, seed=7))
    assert [one.ids for one in sampled(loaded, [again])[0]] != [ids for ids, _, _ in together[0]]


# ---- what is kept ----


def test_the_oldest_prompts_make_room_with_their_answers(tmp_path: Path) -> None:
    store = PromptStore(tmp_path / "p.sqlite", ConsentConfig(prompts=3, bytes=40))
    numbers = [store.keep("12345678") for _ in range(4)]  # 10 bytes each, as JSON
    assert [one.id for one in store.prompts()] == numbers[1:]
    store.keep_answers(numbers[3], "cmpl-1", ["x" * 15], 0)  # 45 bytes in all
    assert [(one.id, one.answers) for one in store.prompts()] == [(numbers[2], 0), (numbers[3], 1)]
    store.keep_answers(numbers[0], "cmpl-2", ["gone"], 0)  # its prompt was removed meanwhile
    store.keep("y" * 50)  # larger than all there is room for: it stays alone
    assert [one.prompt for one in store.prompts()] == ["y" * 50]
    assert store.counts()["bytes"] == 52
    assert not store.rate("cmpl-1", 0, 1)
    store.close()


def test_what_is_removed_is_nowhere_in_the_files(tmp_path: Path) -> None:
    store = PromptStore(tmp_path / "p.sqlite", ConsentConfig())
    number = store.keep([{"role": "user", "content": "a most secret thing"}])
    store.keep_answers(number, "cmpl-1", ["a secret answer"], 2)
    store.keep("another")
    assert store.remove(number)
    assert not store.remove(number)
    assert b"secret" not in b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert (tmp_path / "p.sqlite").stat().st_mode & 0o077 == 0
    store.close()


def test_one_prompt_in_five_is_held_out_and_always_the_same(tmp_path: Path) -> None:
    texts = [json.dumps(f"prompt {number}") for number in range(500)]
    share = sum(map(is_held_out, texts)) / 500
    assert 0.15 < share < 0.25
    store = PromptStore(tmp_path / "p.sqlite", ConsentConfig())
    twice = [store.keep(json.loads(text)) for text in texts[:20] * 2]
    by_number = {one.id: one.held_out for one in store.prompts()}
    assert [by_number[number] for number in twice] == [is_held_out(text) for text in texts[:20]] * 2
    assert store.counts(after=twice[9])["new"] == sum(not by_number[number] for number in twice[10:])
    store.close()


def test_another_database_is_refused(tmp_path: Path) -> None:
    import sqlite3

    with sqlite3.connect(tmp_path / "p.sqlite") as other:
        other.execute("CREATE TABLE mine (x)")
    with pytest.raises(DataError, match="no file of kept prompts; choose another one with --folder"):
        PromptStore(tmp_path / "p.sqlite", ConsentConfig())


def test_thumbs_become_pairs_of_one_prompt(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    rated = [
        RatedAnswer("p", "good", 1),
        RatedAnswer("p", "bad", -1),
        RatedAnswer("p", "bad", -1),  # the same prompt sent again
        RatedAnswer("p", "both", 1),
        RatedAnswer("p", "both", -1),
        RatedAnswer("p", "  ", -1),
        RatedAnswer("q", "alone", 1),
        RatedAnswer(chat, "yes", 1),
        RatedAnswer(chat, "no", -1),
    ]
    rows = thumb_pairs(rated)
    assert {"prompt": "p", "chosen": "good", "rejected": "bad"} in rows
    said = [[{"role": "assistant", "content": text}] for text in ("yes", "no")]
    assert {"prompt": chat, "chosen": said[0], "rejected": said[1]} in rows
    assert len(rows) == 2
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert count_pairs(str(tmp_path / "pairs.jsonl")) == 2


# ---- versions ----


def _run(folder: Path, content: bytes) -> Path:
    (folder / "final-adapter").mkdir(parents=True)
    (folder / "final-adapter" / "adapter_config.json").write_text("{}")
    (folder / "final-adapter" / "adapter_model.safetensors").write_bytes(content)
    return folder


def test_versions_go_forth_and_back(tmp_path: Path) -> None:
    versions, run = Versions(tmp_path), _run(tmp_path / "run", b"one")
    assert versions.manifest().served() == [0]
    versions.add(1, run, {"reward": 0.5}, parent=0, trained=7)
    versions.add(2, None, {"reasons": ["worse"]}, parent=1, trained=9)  # refused: it has numbers and no adapter
    versions.add(3, run, {}, parent=1, trained=12)
    found = Versions(tmp_path).manifest()  # as another process sees it
    assert (found.current, found.trained, found.served(), found.next) == (3, 12, [0, 1, 3], 4)
    assert versions.why(2) == {"reasons": ["worse"]}
    assert [versions.roll_back(), versions.roll_back()] == [1, 0]
    with pytest.raises(RunError, match="the base model is served"):
        versions.roll_back()
    versions.add(1, run, {}, parent=0, trained=99)  # known: nothing happens
    assert versions.manifest().trained == 12
    versions.add(4, run, {}, parent=3, trained=13)  # somebody went back while it was trained
    assert (versions.manifest().current, versions.manifest().served()) == (0, [0, 1, 3, 4])


def test_files_that_are_not_those_put_in_place_are_not_served(tmp_path: Path) -> None:
    versions = Versions(tmp_path)
    versions.add(1, _run(tmp_path / "run", b"one"), {}, parent=0, trained=1)
    versions.check(1)
    (versions.path(1) / "adapter_model.safetensors").write_bytes(b"two")
    with pytest.raises(RunError, match=r"adapter_model\.safetensors is not the file that was put in place"):
        versions.check(1)


@pytest.mark.parametrize("killed_at", range(6))
def test_a_kill_at_any_write_leaves_the_old_version_or_the_whole_new_one(
    killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = Versions(tmp_path)
    versions.add(1, _run(tmp_path / "a", b"one"), {}, parent=0, trained=1)
    steps = 0

    class Killed(BaseException):
        pass

    def dying(name: str) -> Any:
        real = getattr(os, name)

        def step(*given: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps > killed_at:
                raise Killed
            return real(*given)

        return step

    with monkeypatch.context() as patch:
        for name in ("replace", "fsync"):
            patch.setattr(os, name, dying(name))
        patch.setattr("shutil.rmtree", lambda *given, **more: None)  # a killed process cleans nothing up
        patch.setattr(Path, "unlink", lambda *given, **more: None)
        with pytest.raises(Killed):
            versions.add(2, _run(tmp_path / "b", b"two"), {}, parent=1, trained=2)
    after = Versions(tmp_path)
    after.clean()
    assert after.manifest().current == 1
    after.check(1)
    after.add(2, tmp_path / "b", {}, parent=1, trained=2)
    after.check(2)
    assert sorted(one.name for one in after.folder.iterdir()) == ["0001", "0002", "manifest.json", "manifest.lock"]


# ---- the decision ----

OLD = Measured(reward=0.0, metric=0.5, entropy=2.0, kl=1.0, repetition=0.1, ended=0.9, length=20.0)
NEW = replace(OLD, reward=0.2, metric=0.6, kl=2.0)
BETTER = Compared(9, "lexical relevance", OLD, NEW, Interval(0.2, 0.1, 0.3), Interval(0.1, 0.0, 0.2))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"reward": Interval(0.0, -0.1, 0.1)}, None),  # no worse is enough
        ({"reward": Interval(-0.01, -0.1, 0.1)}, "The reward is lower: -0.010"),
        ({"relevance": Interval(-0.1, -0.2, 0.01)}, None),  # perhaps luck
        ({"relevance": Interval(-0.1, -0.2, -0.01)}, "lexical relevance is lower"),
        ({"new": replace(NEW, kl=10.1)}, "above the budget of 10"),
        ({"new": replace(NEW, entropy=0.59)}, "entropy fell from 2.000 to 0.590"),
        ({"new": replace(NEW, repetition=0.31)}, "Repetition rose"),
        ({"new": replace(NEW, ended=0.05)}, "Only 5% of the answers end"),
        ({"warnings": {"length_drift": "Too long."}}, "While it was trained: Too long."),
        ({"warnings": {"dominance": "One term."}}, None),
    ],
)
def test_a_version_that_is_worse_is_not_put_in_place(changes: dict[str, Any], reason: str | None) -> None:
    found = reasons_against(replace(BETTER, **changes), MonitorConfig(), 10.0)
    assert len(found) == (reason is not None)
    assert reason is None or reason in found[0]


# ---- requests and settings ----


@pytest.mark.parametrize(
    ("kind", "body", "param", "told"),
    [
        (CompletionRequest, '{"model": "m", "prompt": "secret"', None, "not valid JSON"),
        (CompletionRequest, "[" * 100_000, None, "not valid JSON"),
        (CompletionRequest, '{"model": "m", "prompt": "\\ud800"}', None, "not valid JSON"),
        (CompletionRequest, '{"prompt": "secret"}', "model", "model: Field required"),
        (CompletionRequest, '{"model": "m", "prompt": "a", "top_k": 3}', "top_k", "knows no such field"),
        (CompletionRequest, '{"model": "m", "prompt": "a", "n": "2"}', "n", "valid integer"),
        (
            CompletionRequest,
            '{"model": "m", "prompt": "a", "temperature": 1e-9}',
            "temperature",
            "0 (greedy), or from 0.01",
        ),
        (CompletionRequest, '{"model": "m", "prompt": "a", "temperature": NaN}', "temperature", "finite"),
        (CompletionRequest, '{"model": "m", "prompt": ["a", "b"]}', None, "valid string"),
        (ChatRequest, '{"model": "m", "messages": []}', "messages", "at least 1 item"),
        (ChatRequest, '{"model": "m", "messages": [{"role": "tool", "content": "x"}]}', "messages.0.role", "'user'"),
        (
            ChatRequest,
            '{"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}',
            "messages.0.content.parts.0.image_url.image_url.url",
            "Field required",
        ),
        (
            ChatRequest,
            '{"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://secret"}}]}]}',
            "messages.0.content.parts.0.image_url.image_url.url",
            "must be the image itself",
        ),
        (
            ChatRequest,
            '{"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": [{}]}',
            "tools",
            "tools",
        ),
    ],
)
def test_a_request_that_is_refused_says_why_and_repeats_nothing(
    kind: Any, body: str, param: str | None, told: str
) -> None:
    with pytest.raises(ApiError) as refused:
        parsed(kind, body.encode())
    assert refused.value.status == 400
    assert told in refused.value.message
    assert "secret" not in refused.value.message
    assert param is None or refused.value.param == param


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (ServeConfig(name="a@b"), "a name without '@'"),
        (
            replace(ServeConfig(), limits=replace(ServeConfig().limits, max_tokens=1)),
            "is below --sampling.max_new_tokens",
        ),
        (replace(ServeConfig(), sampling=replace(ServeConfig().sampling, num_generations=1)), "give 2 or more"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(config: ServeConfig, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        validate(config)
