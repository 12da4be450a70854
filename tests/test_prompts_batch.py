"""Padding and the order of a run's prompts."""

from __future__ import annotations

import json
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cagsr.errors import DataError, RunError
from cagsr.flow import EncodedPrompt, Prompt
from cagsr.prompts.batch import collate_prompts
from cagsr.prompts.salience import DocumentFrequency
from cagsr.prompts.stream import PromptSet, PromptStream

PAD = 99


@st.composite
def encoded_prompts(draw: st.DrawFn) -> EncodedPrompt:
    length = draw(st.integers(1, 9))
    words = draw(st.integers(1, length))
    owners = [
        *range(words),
        *draw(st.lists(st.integers(-1, words - 1), min_size=length - words, max_size=length - words)),
    ]
    ids = draw(st.lists(st.integers(0, 98), min_size=length, max_size=length))
    salience = draw(st.lists(st.floats(0.125, 8, width=32), min_size=words, max_size=words))
    return EncodedPrompt(Prompt(1, "x"), tuple(ids), tuple(draw(st.permutations(owners))), tuple(salience))


@given(
    st.lists(encoded_prompts(), min_size=1, max_size=5),
    st.sampled_from(["left", "right"]),
    st.integers(1, 3),
    st.integers(0, 50),
)
def test_padding_loses_nothing(encoded: list[EncodedPrompt], side: str, copies: int, first: int) -> None:
    batch = collate_prompts(
        encoded,
        pad_token_id=PAD,
        padding_side=side,
        num_generations=copies,
        first_group=first,  # type: ignore[arg-type]
    )
    rows = [one for one in encoded for _ in range(copies)]
    assert batch.ids.shape == batch.real.shape == batch.words.shape == (len(rows), max(len(o.ids) for o in rows))
    assert batch.group.tolist() == [first + i // copies for i in range(len(rows))]
    assert (batch.ids.dtype, batch.real.dtype, batch.salience.dtype) == (torch.int64, torch.bool, torch.float32)
    for row, one in enumerate(rows):
        assert batch.prompts[row] is one.prompt
        assert batch.ids[row][batch.real[row]].tolist() == list(one.ids)
        assert batch.words[row][batch.real[row]].tolist() == list(one.words)
        assert (batch.ids[row][~batch.real[row]] == PAD).all()
        assert (batch.words[row][~batch.real[row]] == -1).all()
        assert batch.salience[row].tolist() == [*one.salience] + [0.0] * (batch.salience.shape[1] - len(one.salience))
        assert bool(batch.real[row, -1 if side == "left" else 0])


def test_a_batch_by_hand() -> None:
    long = EncodedPrompt(Prompt(1, "a"), (1, 2, 3), (-1, 0, 1), (0.5, 2.0))
    short = EncodedPrompt(Prompt(2, "b"), (4, 5), (-1, 0), (1.0,))
    left = collate_prompts([long, short], pad_token_id=0, padding_side="left")
    assert left.ids.tolist() == [[1, 2, 3], [0, 4, 5]]
    assert left.real.tolist() == [[True] * 3, [False, True, True]]
    assert left.words.tolist() == [[-1, 0, 1], [-1, -1, 0]]
    assert left.salience.tolist() == [[0.5, 2.0], [1.0, 0.0]]
    right = collate_prompts([long, short], pad_token_id=0, padding_side="right")
    assert right.ids.tolist() == [[1, 2, 3], [4, 5, 0]]
    with pytest.raises(ValueError, match="at least one prompt"):
        collate_prompts([], pad_token_id=0, padding_side="left")


# ---- the order of a run ----


def prompt_set(size: int, *, streamed: bool = False) -> PromptSet:
    prompts = [EncodedPrompt(Prompt(i, str(i)), (i,), (0,), (1.0,)) for i in range(size)]
    if streamed:
        return PromptSet(prompts[:2], DocumentFrequency(1), (), lambda: iter(prompts))
    return PromptSet(prompts, DocumentFrequency(1))


def rows(batch: list[EncodedPrompt]) -> list[int]:
    return [one.prompt.row for one in batch]


def take(stream: PromptStream, batches: int) -> list[int]:
    return [row for _ in range(batches) for row in rows(stream.next())]


@pytest.mark.parametrize("streamed", [False, True])
def test_epochs_are_shuffled_anew_and_hold_every_prompt_once(streamed: bool) -> None:
    order = take(PromptStream(prompt_set(10, streamed=streamed), 3, seed=4), 10)  # three epochs, batches across borders
    epochs = [order[0:10], order[10:20], order[20:30]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs} | {tuple(range(10))}) == 4
    assert order == take(PromptStream(prompt_set(10, streamed=streamed), 3, seed=4), 10)
    assert order != take(PromptStream(prompt_set(10, streamed=streamed), 3, seed=5), 10)


@pytest.mark.parametrize("streamed", [False, True])
@given(size=st.integers(1, 12), batch=st.integers(1, 5), before=st.integers(0, 9))
def test_a_resumed_stream_goes_on_where_it_stopped(streamed: bool, size: int, batch: int, before: int) -> None:
    first = PromptStream(prompt_set(size, streamed=streamed), batch, seed=1)
    take(first, before)
    state = json.loads(json.dumps(first.state_dict()))
    second = PromptStream(prompt_set(size, streamed=streamed), batch, seed=1)
    second.load_state_dict(state)
    assert take(first, 4) == take(second, 4)
    assert first.state_dict() == second.state_dict()


@pytest.mark.parametrize("streamed", [False, True])
def test_processes_share_one_global_order(streamed: bool) -> None:
    alone = PromptStream(prompt_set(7, streamed=streamed), 6, seed=2)
    pair = [PromptStream(prompt_set(7, streamed=streamed), 3, 2, index, 2) for index in range(2)]
    for _ in range(5):
        assert rows(alone.next()) == [row for one in pair for row in rows(one.next())]
    assert pair[0].state_dict() == pair[1].state_dict() == alone.state_dict()


def test_a_streamed_set_is_not_held_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cagsr.prompts.stream.BUFFER_ROWS", 8)
    read = 0

    def source():
        nonlocal read
        for i in range(1000):
            read += 1
            yield EncodedPrompt(Prompt(i, str(i)), (i,), (0,), (1.0,))

    stream = PromptStream(PromptSet(list(islice(source(), 2)), DocumentFrequency(1), (), source), 4, seed=0)
    read = 0
    seen = take(stream, 5)
    assert read <= 8 + 20
    assert len(set(seen)) == 20
    assert seen != sorted(seen)


def test_streams_that_cannot_go_on() -> None:
    with pytest.raises(DataError, match="no prompt to train on"):
        PromptStream(prompt_set(0), 2, seed=0)
    stream = PromptStream(prompt_set(3), 2, seed=0)
    with pytest.raises(RunError, match=r"--run\.seed 7"):
        stream.load_state_dict({"seed": 7, "epoch": 0, "position": 0})
    with pytest.raises(RunError, match="the data holds fewer now"):
        stream.load_state_dict({"seed": 0, "epoch": 0, "position": 4})
