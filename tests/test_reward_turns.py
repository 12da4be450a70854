"""Episodes of several turns taken apart into answers, judged each by itself, and put together again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import tiny
from cagsr.errors import RewardError
from cagsr.flow import (
    Attention,
    Context,
    EncodedPrompt,
    Episode,
    EpisodeBatch,
    Prompt,
    PromptBatch,
    Readings,
    RewardBatch,
    Segment,
)
from cagsr.models.texts import token_texts
from cagsr.prompts.salience import DocumentFrequency
from cagsr.reward.association import learn_associations
from cagsr.reward.function import RewardFunction
from cagsr.reward.pooling import pool_pieces
from cagsr.reward.registry import COSTLY, Resources, TermClass
from cagsr.reward.settings import TERMS
from cagsr.reward.term import PartialValues
from cagsr.reward.turns import Exchanges
from cagsr.reward.user_functions import TextFunction
from cagsr.reward.values import ask
from conversations import conversations
from test_models_texts import byte_level

CHAT = ({"role": "user", "content": "Name a cat."},)


def by_hand() -> RewardBatch:
    """Three episodes to two prompts, written out: two of two turns, one of one.

    Tokens by row, | between segments, w where a salient word stands: ``a a | w | b b``, ``a | w w | b``, ``a a``. Prompts have
    two tokens; the second is the first salient word. A third word is in the first episode's first answer.
    """
    first = EncodedPrompt(Prompt(1, "Name a cat.", messages=CHAT), (4, 5), (-1, 0), (1.0,))
    other = EncodedPrompt(Prompt(2, "A dog"), (6, 7), (-1, 0), (1.5,))

    def said(ids: tuple[int, ...], text: str, turn: int) -> Segment:
        return Segment(ids, text, "assistant", turn, sampled=True)

    def read(ids: tuple[int, ...], text: str) -> Segment:
        return Segment(ids, text, "user", 1, sampled=False, words=(0,) * len(ids), salience=(2.0,))

    episodes = (
        Episode(first, (said((8, 9), "Tom.", 0), read((10,), "Another."), said((11, 12), "Kit.", 1)), ended=True),
        Episode(first, (said((8,), "Mog.", 0), read((13, 14), "No, a black one."), said((15,), "Ni", 1)), ended=False),
        Episode(other, (said((16, 17), " barks.", 0),), ended=True),
    )
    episode_batch = EpisodeBatch(
        prompts=PromptBatch(
            (first.prompt, first.prompt, other.prompt),
            torch.tensor([[4, 5], [4, 5], [6, 7]]),
            torch.ones(3, 2, dtype=torch.bool),
            torch.tensor([[-1, 0]] * 3),
            torch.tensor([[1.0], [1.0], [1.5]]),
            torch.tensor([4, 4, 7]),
        ),
        ids=torch.tensor([[8, 9, 10, 11, 12], [8, 13, 14, 15, 0], [16, 17, 0, 0, 0]]),
        real=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool(),
        sampled=torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 1, 0], [1, 1, 0, 0, 0]]).bool(),
        turn=torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]]),
        ended=torch.tensor([True, False, True]),
        completions=("Kit.", "Ni", " barks."),
        context=Context(
            words=torch.tensor([[-1, 0, -1, 2, 1, -1, -1], [-1, 0, -1, 1, 1, -1, -1], [-1, 0, -1, -1, -1, -1, -1]]),
            salience=torch.tensor([[1.0, 2.0, 0.5], [1.0, 2.0, 0.0], [1.5, 0.0, 0.0]]),
            word_turn=torch.tensor([[0, 1, 1], [0, 1, 0], [0, 0, 0]]),
            episodes=episodes,
        ),
    )
    numbers = torch.arange(15.0).view(3, 5)
    maps = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0)) / 7
    words = pool_pieces(maps, episode_batch.words, 3)
    readings = Readings(-numbers, numbers + 100, numbers + 200, -numbers / 100, numbers + 300, numbers + 400)
    return RewardBatch(episode_batch, readings, -numbers - 0.5, Attention(maps, words), trainer=None)


class Plain:
    """A term that looks over all turns, as none that says nothing of it."""

    name = "plain"
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, function: Callable[[RewardBatch], Tensor | PartialValues] | None = None) -> None:
        self.function = function

    def __call__(self, batch: RewardBatch) -> Tensor | PartialValues:
        assert self.function is not None
        return self.function(batch)


class OfFirst(Plain):
    name = "first"
    turns = "first"


class OfLatest(Plain):
    name = "latest"
    turns = "latest"


def test_each_answer_is_a_row_of_its_own():
    batch = by_hand()
    exchanges = Exchanges.of(batch)
    assert exchanges.row is not None
    assert exchanges.turn is not None
    assert exchanges.row.tolist() == [0, 0, 1, 1, 2]
    assert exchanges.turn.tolist() == [0, 1, 0, 1, 0]
    first, second, third = exchanges.group[0], exchanges.group[1], exchanges.group[4]
    assert exchanges.group.tolist() == [first, second, first, second, third]
    assert len({int(first), int(second), int(third)}) == 3
    answers = exchanges.batch.episodes
    expected = [[1, 1, 0, 0, 0], [0, 0, 0, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 1, 0], [1, 1, 0, 0, 0]]
    assert answers.sampled.int().tolist() == answers.real.int().tolist() == expected
    assert answers.lengths.tolist() == [2, 2, 1, 1, 2]
    assert answers.completions == ("Tom.", "Kit.", "Mog.", "Ni", " barks.")
    # An answer that is not the last one has ended, or nothing would have followed it.
    assert answers.ended.tolist() == [True, True, True, False, True]
    row = exchanges.row
    assert torch.equal(answers.ids, batch.episodes.ids[row])
    assert torch.equal(answers.prompts.group, batch.episodes.prompts.group[row])
    assert torch.equal(answers.context_ids, batch.episodes.context_ids[row])
    read = exchanges.batch.readings
    for name, value in vars(batch.readings).items():
        assert torch.equal(getattr(read, name), value[row]), name
    assert exchanges.batch.reference_logprobs is not None
    assert batch.reference_logprobs is not None
    assert torch.equal(exchanges.batch.reference_logprobs, batch.reference_logprobs[row])
    assert exchanges.batch.attention is not None
    assert batch.attention is not None
    assert torch.equal(exchanges.batch.attention.maps, batch.attention.maps[row])
    assert torch.equal(exchanges.batch.attention.words, batch.attention.words[row])


def test_words_of_later_turns_do_not_count():
    answers = Exchanges.of(by_hand()).batch.episodes
    assert answers.salience.tolist() == [[1, 0, 0], [1, 2, 0.5], [1, 0, 0], [1, 2, 0], [1.5, 0, 0]]
    prompt_alone = [-1, 0, -1, -1, -1, -1, -1]
    assert answers.words.tolist() == [
        prompt_alone,
        [-1, 0, -1, 2, 1, -1, -1],
        prompt_alone,
        [-1, 0, -1, 1, 1, -1, -1],
        prompt_alone,
    ]


def test_what_was_said_since_is_part_of_the_prompt():
    prompts = Exchanges.of(by_hand()).batch.episodes.prompts.prompts
    assert [one.text for one in prompts] == [
        "Name a cat.",
        "Name a cat.Tom.Another.",
        "Name a cat.",
        "Name a cat.Mog.No, a black one.",
        "A dog",
    ]
    assert [one.row for one in prompts] == [1, 1, 1, 1, 2]
    assert prompts[0].messages == CHAT
    assert prompts[3].messages == (
        *CHAT,
        {"role": "assistant", "content": "Mog."},
        {"role": "user", "content": "No, a black one."},
    )
    assert prompts[4].messages is None


def test_a_term_may_look_over_the_first_turn_or_the_latest():
    exchanges = Exchanges.of(by_hand())
    assert exchanges.seen_by(Plain()) is exchanges.batch
    first = exchanges.seen_by(OfFirst()).episodes
    assert first.salience.tolist() == [[1, 0, 0]] * 4 + [[1.5, 0, 0]]
    assert first.words.tolist() == [[-1, 0, -1, -1, -1, -1, -1]] * 5
    latest = exchanges.seen_by(OfLatest()).episodes
    assert latest.salience.tolist() == [[1, 0, 0], [0, 2, 0.5], [1, 0, 0], [0, 2, 0], [1.5, 0, 0]]
    assert latest.words[1].tolist() == [-1, -1, -1, 2, 1, -1, -1]
    assert latest.words[3].tolist() == [-1, -1, -1, 1, 1, -1, -1]
    assert torch.equal(latest.sampled, exchanges.batch.episodes.sampled)


def test_what_answers_were_paid_is_put_together_by_episode():
    exchanges = Exchanges.of(by_hand())
    total = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    per_token = exchanges.batch.episodes.sampled * torch.tensor([[0.5], [1.0], [4.0], [8.0], [8.0]])
    raw = torch.tensor([1.0, float("nan"), 3.0, 6.0, float("nan")])
    found = exchanges.folded(total, per_token, {"plain": raw}, {"plain": 2 * total})
    assert found.total.tolist() == [3.0, 12.0, 16.0]
    assert found.by_turn.tolist() == [[1.0, 2.0], [4.0, 8.0], [16.0, 0.0]]
    assert found.per_token.tolist() == [[0.5, 0.5, 0, 1, 1], [4, 0, 0, 8, 0], [8, 8, 0, 0, 0]]
    assert found.contributions["plain"].tolist() == [6.0, 24.0, 32.0]
    # The mean over the turns to which the term applies; where it applies to none, it does not apply.
    assert found.terms["plain"][:2].tolist() == [1.0, 4.5]
    assert found.terms["plain"][2].isnan()


def test_one_turn_is_the_batch_itself(make_reward_batch: Callable[..., RewardBatch]):
    batch = make_reward_batch()
    exchanges = Exchanges.of(batch)
    assert exchanges.batch is batch
    assert exchanges.group is batch.episodes.prompts.group
    for term in (Plain(), OfFirst(), OfLatest()):
        assert exchanges.seen_by(term) is batch
    total, per_token, terms = torch.rand(6), torch.rand(6, 6), {"plain": torch.rand(6)}
    found = exchanges.folded(total, per_token, terms, terms)
    assert found.total is total
    assert found.per_token is per_token
    assert torch.equal(found.by_turn, total[:, None])
    assert found.terms is found.contributions is terms


def lengths(batch: RewardBatch) -> Tensor:
    return batch.episodes.lengths.float()


def test_each_answer_is_judged_among_those_of_its_turn_and_paid_at_its_end():
    """Raw values of 2, 2; 1, 1; 2: within the prompt and the turn the deviations are +-0.5, and one has no other."""
    batch = by_hand()
    reward = RewardFunction([Plain(lengths)], [2.0], "within_prompt", clip=0.0)
    found = reward(batch)
    # Four deviations of 0.5 and two degrees of freedom: a deviation of sqrt(0.5). The one alone is 2 - 1.6 from the mean.
    half, alone = 0.5 / 0.5**0.5, 0.4 / 0.5**0.5
    torch.testing.assert_close(found.by_turn, 2 * torch.tensor([[half, half], [-half, -half], [alone, 0.0]]))
    torch.testing.assert_close(found.total, 2 * torch.tensor([2 * half, -2 * half, alone]))
    at_ends = [[0, half, 0, 0, half], [-half, 0, 0, -half, 0], [0, alone, 0, 0, 0]]
    torch.testing.assert_close(found.per_token, 2 * torch.tensor(at_ends))
    torch.testing.assert_close(found.per_token.sum(1), found.total)
    torch.testing.assert_close(found.contributions["plain"], found.total)
    assert found.terms["plain"].tolist() == [2.0, 1.0, 2.0]


def test_a_dense_term_pays_the_tokens_of_its_answer():
    """Each call is handed answers: gains of a token that is not its answer's are not looked at."""

    def places(batch: RewardBatch) -> Tensor:
        gains = torch.arange(1.0, 6.0).expand(batch.episodes.ids.shape)
        return torch.where(batch.episodes.sampled, gains, torch.nan)

    found = RewardFunction([Plain(places)], [1.0], "none")(by_hand())
    assert found.per_token.tolist() == [[1, 2, 0, 4, 5], [1, 0, 0, 4, 0], [1, 2, 0, 0, 0]]
    assert found.by_turn.tolist() == [[3.0, 9.0], [1.0, 4.0], [3.0, 0.0]]


def test_functions_of_texts_judge_each_answer_with_what_was_said_before_it():
    asked: list[tuple[object, object, object]] = []

    def judge(prompts: list[object], completions: list[object], completion_ids: list[object]) -> list[float | None]:
        asked.extend(zip(prompts, completions, completion_ids, strict=True))
        return [1.0, None, 3.0, 4.0, 5.0]

    term = TextFunction("judge", judge, frozenset({"prompts", "completions", "completion_ids"}))
    found = RewardFunction([term], [1.0], "none")(by_hand())
    assert [ids for _, _, ids in asked] == [[8, 9], [11, 12], [8], [15], [16, 17]]
    assert asked[1][1] == [{"role": "assistant", "content": "Kit."}]
    assert asked[1][0] == [
        *CHAT,
        {"role": "assistant", "content": "Tom."},
        {"role": "user", "content": "Another."},
    ]
    assert asked[4][:2] == ("A dog", " barks.")
    assert found.by_turn.tolist() == [[1.0, 0.0], [3.0, 4.0], [5.0, 0.0]]
    assert found.terms["judge"].tolist() == [1.0, 3.5, 5.0]


def test_a_value_that_is_no_number_names_the_prompt_as_it_stood():
    def bad(batch: RewardBatch) -> Tensor:
        return torch.tensor([1.0, 1.0, 1.0, float("inf"), 1.0])

    with pytest.raises(
        RewardError, match=r"'plain' gave inf for the prompt of row 1 \('Name a cat.Mog.No, a black one.'\)"
    ):
        RewardFunction([Plain(bad)], [1.0], "none")(by_hand())


# ---- every built-in term ----


def alone(batch: RewardBatch, row: int, turn: int) -> RewardBatch:
    """One answer of a batch as the only one to a prompt that ends where it begins."""
    episodes, context = batch.episodes, batch.episodes.context
    assert context is not None
    assert batch.attention is not None
    width = episodes.prompts.ids.shape[1]
    (own,) = (episodes.sampled[row] & (episodes.turn[row] == turn)).nonzero(as_tuple=True)
    start, stop = int(own[0]), int(own[-1]) + 1
    seen = slice(0, width + start)
    counts = context.word_turn[row] <= turn
    words = context.words[row, seen]
    words = torch.where((words >= 0) & counts[words.clamp(min=0)], words, -1)
    salience = context.salience[row] * counts
    before = [
        one for one in context.episodes[row].segments if one.turn < turn or (one.turn == turn and not one.sampled)
    ]
    given = context.episodes[row].first.prompt
    prompt = replace(given, text=given.text + "".join(one.text for one in before))
    said = slice(start, stop)
    maps = batch.attention.maps[row : row + 1, said, seen]
    last = turn == int(episodes.turn[row][episodes.sampled[row]].max())
    mask = torch.ones(1, stop - start, dtype=torch.bool)
    one = EpisodeBatch.of_one_turn(
        PromptBatch(
            (prompt,),
            episodes.context_ids[row : row + 1, seen],
            torch.cat([episodes.prompts.real[row], episodes.real[row, :start]])[None],
            words[None],
            salience[None],
            episodes.prompts.group[row : row + 1],
        ),
        episodes.ids[row : row + 1, said],
        mask,
        episodes.ended[row : row + 1] if last else torch.tensor([True]),
        (context.episodes[row].answers[turn],),
    )
    readings = Readings(**{name: value[row : row + 1, said] for name, value in vars(batch.readings).items()})
    attention = Attention(maps, pool_pieces(maps, words[None], len(salience)))
    assert batch.reference_logprobs is not None
    return RewardBatch(one, readings, batch.reference_logprobs[row : row + 1, said], attention)


@dataclass
class Many:
    """A batch of random conversations that copy words of their prompts and replies."""

    batch: RewardBatch

    @classmethod
    def made(cls) -> Many:
        sizes = [(3, 2, 4, 1, 5), (5,), (2, 4, 6), (1, 3, 3), (4, 4, 2, 2, 3), (6, 1, 1)]
        episodes = conversations([5, 3], [0, 1, 0, 1, 1, 0], sizes, vocabulary=12, seed=4)
        episodes = replace(episodes, ended=torch.tensor([True, False, False, True, False, True]))
        generator = torch.Generator().manual_seed(2)
        shape = episodes.ids.shape

        def noise(scale: float) -> Tensor:
            return torch.rand(shape, generator=generator).masked_fill(~episodes.sampled, 0.0) * scale

        width = episodes.prompts.ids.shape[1]
        maps = torch.rand(*shape, width + shape[1], generator=generator) * 0.3
        maps = maps.masked_fill(torch.arange(width + shape[1]) >= width + torch.arange(shape[1])[:, None], 0.0)
        maps = maps * episodes.sampled[:, :, None] * torch.cat([episodes.prompts.real, episodes.real], 1)[:, None]
        readings = Readings(-noise(1.0), noise(2.0), noise(3.0), noise(0.0), noise(1.0), noise(0.0) - 1.0)
        words = pool_pieces(maps, episodes.words, episodes.salience.shape[1])
        return cls(RewardBatch(episodes, readings, -noise(1.0), Attention(maps, words)))


LEARNED = learn_associations(
    [("the cat likes", ()), ("a dog sees", ()), ("a bird house", ()), ("the tree", ())] * 3,
    ["cat sees", "dog likes", "bird house", "tree house"] * 3,
    min_count=1,
)


# Each of these says something in some prompts only.
COUNTED = DocumentFrequency(100, dict.fromkeys(("cat", "dog", "bird", "tree", "house", "red", "big", "food"), 3))


def pairs_of_tokens(episodes: EpisodeBatch) -> torch.Tensor:
    """Stands in for the words that state something: every two tokens of an answer are one."""
    return torch.where(episodes.sampled, (episodes.sampled.cumsum(dim=1) - 1) // 2, -1)


# Not those that run programs, ask for labels, or judge single answers alone.
FORMS = [
    (term, dense)
    for term in TERMS
    for dense in (False, True)
    if term.shown and not COSTLY & term.needs and term.name != "agreement"  # which compares answers
    if not dense or "dense" in term.config.__dataclass_fields__
]


@pytest.mark.parametrize(("term", "dense"), FORMS, ids=lambda one: getattr(one, "name", "dense" if one else "whole"))
def test_a_term_says_of_each_answer_what_it_says_of_it_alone(term: TermClass, dense: bool):
    fields = term.config.__dataclass_fields__
    # Alone, all that was said before is one plain prompt, in which nobody is named.
    given = {"dense": dense, "n": 1, "of": "all"}
    settings = term.config(**{name: value for name, value in given.items() if name in fields})
    made = term.term(
        settings, Resources(token_texts(tiny.tokenizer()), LEARNED, frequency=COUNTED, stating_tokens=pairs_of_tokens)
    )
    batch = Many.made().batch
    exchanges = Exchanges.of(batch)
    assert exchanges.row is not None
    assert exchanges.turn is not None
    found = ask(made, exchanges.seen_by(made)).values
    assert len(found) == 13
    values = []
    for number, (row, turn) in enumerate(zip(exchanges.row.tolist(), exchanges.turn.tolist(), strict=True)):
        expected = ask(made, alone(batch, row, turn)).values[0]
        own = found[number][exchanges.batch.episodes.sampled[number]] if dense else found[number]
        torch.testing.assert_close(own, expected, atol=1e-6, rtol=1e-5, msg=lambda text: f"{row}, {turn}: {text}")  # noqa: B023
        values.append(float(expected.sum()))
    assert len({round(value, 5) for value in values}) > 2, "a term that says the same of all would prove nothing"


@pytest.mark.parametrize("name", ["coverage", "grounded_coverage"])
@pytest.mark.parametrize("dense", [False, True])
def test_what_is_new_sums_to_the_coverage_by_all_that_was_said(name: str, dense: bool):
    """Of the prompt's words: each answer is paid for what those before it have not covered."""
    term = next(term for term in TERMS if term.name == name)
    resources = Resources(token_texts(tiny.tokenizer()), LEARNED)
    made = term.term(term.config(turns="first", new=True, dense=dense), resources)
    stands_alone = term.term(term.config(turns="first"), resources)
    batch = Many.made().batch
    exchanges = Exchanges.of(batch)
    assert exchanges.row is not None
    found = ask(made, exchanges.seen_by(made)).values
    assert found.shape == (exchanges.batch.episodes.ids.shape if dense else exchanges.row.shape)
    own = found.sum(dim=1) if dense else found
    assert float(own.min()) >= 0
    episodes, context = batch.episodes, batch.episodes.context
    assert context is not None
    first = replace(
        context, words=torch.where(context.word_turn.gather(1, context.words.clamp(min=0)) == 0, context.words, -1)
    )
    first = replace(first, salience=torch.where(context.word_turn == 0, context.salience, 0.0))
    whole = ask(stands_alone, replace(batch, episodes=replace(episodes, context=first))).values
    summed = torch.zeros(len(episodes.ids)).index_add(0, exchanges.row, own)
    torch.testing.assert_close(summed, whole, atol=1e-6, rtol=1e-5)
    # Each alone, the same words are paid again and again.
    again = torch.zeros(len(episodes.ids)).index_add(
        0, exchanges.row, ask(stands_alone, exchanges.seen_by(stands_alone)).values
    )
    assert float((again - summed).min()) > -1e-6
    assert float((again - summed).max()) > 0.01


def test_an_answers_first_token_begins_a_word_in_every_turn():
    """Behind a letter that somebody else wrote a word is split as at the start of an answer, and is said all the same."""
    tokenizer = byte_level("ĠPalace", "Pal", "ace")
    number = tokenizer.get_vocab()
    term = next(term for term in TERMS if term.name == "copy_coverage")
    made = term.term(term.config(), Resources(texts=token_texts(tokenizer)))
    first = EncodedPrompt(Prompt(1, " Palace"), (number["ĠPalace"],), (0,), (1.0,))
    pieces = (number["Pal"], number["ace"])
    reply = Segment((number["-"], number["T"]), "-T", "user", 1, sampled=False)
    segments = (
        Segment(pieces, "Palace", "assistant", 0, sampled=True),
        reply,
        Segment(pieces, "Palace", "assistant", 1, sampled=True),
    )
    sampled = torch.tensor([[True, True, False, False, True, True]])
    words = torch.tensor([[0, -1, -1, -1, -1, -1, -1]])
    ids = torch.tensor([[*pieces, *reply.ids, *pieces]])
    turn = torch.tensor([[0, 0, 1, 1, 1, 1]])
    context = Context(words, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long), (Episode(first, segments, True),))
    prompts = PromptBatch(
        (first.prompt,),
        torch.tensor([first.ids]),
        torch.ones(1, 1).bool(),
        words[:, :1],
        torch.ones(1, 1),
        words[0, :1],
    )
    real = torch.ones(1, 6, dtype=torch.bool)
    episodes = EpisodeBatch(prompts, ids, real, sampled, turn, real[:, 0], ("Palace",), context=context)
    maps = torch.full((1, 6, 7), 0.1)
    batch = RewardBatch(episodes, Readings(*torch.zeros(4, 1, 6)), None, Attention(maps, pool_pieces(maps, words, 1)))
    assert ask(made, Exchanges.of(batch).batch).values.tolist() == [1.0, 1.0]
