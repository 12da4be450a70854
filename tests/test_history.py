"""The whole history in the reward: weights by turn and role, what was said before, which turns a term looks over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cagsr.config import SalienceConfig, validate
from cagsr.errors import ConfigError, DataError
from cagsr.flow import Episode, EpisodeBatch, Segment, Spoken
from cagsr.prompts.encode import TextEncoder, encode_prompt, truncate_prompt
from cagsr.prompts.prepare import encode_texts
from cagsr.prompts.salience import DocumentFrequency, explain_salience
from cagsr.reward.registry import Resources
from cagsr.reward.settings import TERMS
from cagsr.reward.terms.coverage import Coverage, CoverageConfig
from cagsr.reward.terms.history_repetition import HistoryRepetition, HistoryRepetitionConfig, said_before
from cagsr.reward.turns import Exchanges
from cagsr.tasks.segments import SegmentEncoder
from test_reward_turns import by_hand
from test_tasks import chat_model, ids_of

UNIFORM = SalienceConfig(weighting="uniform")
HISTORY = [
    {"role": "system", "content": "and"},
    {"role": "user", "content": "the red cat"},
    {"role": "assistant", "content": "a dog"},
    {"role": "user", "content": "big cat"},
]


def weights(folder: Path, **settings: float) -> dict[str, float]:
    tokenizer = chat_model(folder).tokenizer
    (encoded,) = encode_texts([HISTORY], tokenizer, replace(UNIFORM, **settings), 100)
    return dict(explain_salience(encoded, tokenizer))


def test_words_weigh_less_for_each_exchange_since(tmp_path: Path):
    """The last message and the answer before it are of now; a word that is said again is as new as its newest."""
    found = weights(tmp_path, turn_decay=0.5)
    assert found == {"and": 0.5, "the": 0.5, "red": 0.5, "cat": 1.0, "a": 1.0, "dog": 1.0, "big": 1.0}
    assert set(weights(tmp_path, turn_decay=0.0)) == {"cat", "a", "dog", "big"}
    assert set(weights(tmp_path).values()) == {1.0}


def test_words_weigh_what_their_speaker_does(tmp_path: Path):
    found = weights(tmp_path, assistant_weight=0.25, other_weight=0.0, user_weight=2.0)
    assert found == {"the": 2.0, "red": 2.0, "cat": 2.0, "a": 0.25, "dog": 0.25, "big": 2.0}
    with pytest.raises(DataError, match="row 1: no word that matters is left under the weights of roles and turns"):
        weights(tmp_path, turn_decay=0.0, user_weight=0.0, assistant_weight=0.0)
    with pytest.raises(ConfigError, match="every role's weight is 0"):
        validate(SalienceConfig(user_weight=0, assistant_weight=0, other_weight=0))


def test_where_messages_lie_is_kept_when_the_prompt_is_cut(tmp_path: Path):
    tokenizer = chat_model(tmp_path).tokenizer
    (encoded,) = encode_texts([HISTORY], tokenizer, UNIFORM, 100)
    prompt = encoded.prompt
    assert [prompt.text[one.start : one.end] for one in prompt.spoken] == [one["content"] for one in HISTORY]
    assert [(one.role, one.age) for one in prompt.spoken] == [
        ("system", 1), ("user", 1), ("assistant", 0), ("user", 0)
    ]  # fmt: skip
    tokens = encode_prompt(prompt, TextEncoder(tokenizer))
    shorter, _ = truncate_prompt(prompt, tokens, len(tokens.ids) - 2, "f, row 1")  # without "and" and "the"
    assert [shorter.text[one.start : one.end].strip() for one in shorter.spoken] == ["", "red cat", "a dog", "big cat"]


def test_what_is_said_later_weighs_by_role_too_and_a_template_s_words_nothing(tmp_path: Path):
    chat = chat_model(tmp_path)
    (prompt,) = encode_texts([HISTORY[1:2]], chat.tokenizer, UNIFORM, 100)
    encoder = SegmentEncoder(chat, replace(UNIFORM, user_weight=3.0, assistant_weight=0.5), DocumentFrequency(1, {}))
    end = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    answer = encoder.answer([*ids_of(chat, "a dog"), end], "a dog", 0)
    assert answer.salience == (0.5, 0.5)
    reply = encoder.reply(Episode(prompt, (answer,), True), "big house")
    assert reply.salience == (3.0, 3.0)
    said = chat.tokenizer.convert_ids_to_tokens([i for i, w in zip(reply.ids, reply.words, strict=True) if w >= 0])
    assert said == ["big", "house"]


def test_of_episodes_weights_fade_by_the_turn_that_is_judged():
    """By hand: the prompt's word is a turn old in the second turn; the answer's and the reply's are new there."""
    batch = by_hand()
    assert batch.episodes.context is not None
    faded = replace(batch.episodes, context=replace(batch.episodes.context, turn_decay=0.25))
    found = Exchanges.of(replace(batch, episodes=faded)).batch.episodes
    assert found.salience.tolist() == [[1, 0, 0], [0.25, 2, 0.5], [1, 0, 0], [0.25, 2, 0], [1.5, 0, 0]]
    gone = Exchanges.of(
        replace(batch, episodes=replace(faded, context=replace(batch.episodes.context, turn_decay=0.0)))
    ).batch.episodes
    assert gone.salience[1].tolist() == [0, 2, 0.5]
    assert gone.words[1].tolist() == [-1, -1, -1, 2, 1, -1, -1]  # and what weighs nothing is no word


@pytest.mark.parametrize("name", ["coverage", "grounded_coverage", "copy_coverage", "mean_mass", "focus"])
def test_over_which_turns_a_term_of_the_attention_looks_is_a_setting(name: str):
    (registered,) = [term for term in TERMS if term.name == name]
    exchanges = Exchanges.of(by_hand())
    resources = Resources(texts=object())  # type: ignore[arg-type]
    term = registered.term(registered.config(turns="latest"), resources)
    assert exchanges.seen_by(term).episodes.salience[1].tolist() == [0, 2, 0.5]
    term = registered.term(registered.config(turns="first"), resources)
    assert exchanges.seen_by(term).episodes.salience[1].tolist() == [1, 0, 0]
    assert exchanges.seen_by(registered.term(registered.config(), resources)) is exchanges.batch


def test_coverage_of_the_latest_turn_is_that_of_its_words_alone():
    exchanges = Exchanges.of(by_hand())
    latest = Coverage(CoverageConfig(threshold=0.05, turns="latest"))
    over_all = Coverage(CoverageConfig(threshold=0.05))
    batch = exchanges.seen_by(latest)
    looked = batch.attention.words[1]  # type: ignore[union-attr]
    mask = batch.episodes.sampled[1]
    by_word = (looked[mask].max(dim=0).values / 0.05).clamp(max=1)
    assert float(latest(batch)[1]) == pytest.approx(float((by_word[1] * 2 + by_word[2] * 0.5) / 2.5))
    whole = float((by_word[0] + by_word[1] * 2 + by_word[2] * 0.5) / 3.5)
    assert float(over_all(exchanges.batch)[1]) == pytest.approx(whole)


@pytest.mark.parametrize(
    ("answer", "before", "n", "share"),
    [
        ("The red cat sat. The red cat ran.", ["a red cat sat"], 2, 3 / 7),  # red cat, cat sat; red cat again
        ("the red cat", ["The RED cat!"], 3, 1.0),
        ("the red cat", ["the red", "red cat"], 3, 0.0),  # n-grams of one text each
        ("red cat", ["red cat"], 3, 0.0),  # shorter than n
        ("", ["red"], 1, 0.0),
        ("red cat", [], 1, 0.0),
    ],
)
def test_the_share_that_was_said_before_by_hand(answer: str, before: list[str], n: int, share: float):
    assert said_before(answer, before, n) == pytest.approx(share)


def spoken(episodes: EpisodeBatch, answers: list[str], messages: bool) -> EpisodeBatch:
    """The episodes of ``by_hand`` with other words: what is judged is told by the texts alone."""
    context = episodes.context
    assert context is not None
    changed = []
    for episode, text in zip(context.episodes, answers, strict=True):
        said = iter(text.split("|"))
        segments = tuple(replace(one, text=next(said)) for one in episode.segments)
        first = replace(episode.first, prompt=replace(episode.first.prompt, messages=CHAT if messages else None))
        changed.append(replace(episode, first=first, segments=segments))
    prompts = replace(episodes.prompts, prompts=tuple(one.first.prompt for one in changed))
    return replace(
        episodes,
        prompts=prompts,
        completions=tuple(one.answers[-1] for one in changed),
        context=replace(context, episodes=tuple(changed)),
    )


CHAT = (
    {"role": "user", "content": "what is it"},
    {"role": "assistant", "content": "it is old"},
    {"role": "user", "content": "no"},
)


@pytest.mark.parametrize("messages", [False, True])
def test_an_answer_is_charged_for_what_earlier_answers_said(messages: bool):
    batch = by_hand()
    told = spoken(
        batch.episodes, ["a big cat|what dog|a big cat here", "old dog|a cat|what dog now", "it is old"], messages
    )
    answers = Exchanges.of(replace(batch, episodes=told)).batch
    of_answers = HistoryRepetition(HistoryRepetitionConfig(n=2))(answers)
    # A first answer repeats nothing but what the data's own answer said; of "a big cat here" two of three pairs were said.
    assert of_answers.tolist() == pytest.approx([0.0, 2 / 3, 0.0, 0.0, 1.0 if messages else 0.0])
    of_all = HistoryRepetition(HistoryRepetitionConfig(n=2, of="all"))(answers)
    assert of_all[3] == pytest.approx(0.0)  # what dog | now: said by nobody in a row
    assert of_all[1] == pytest.approx(2 / 3)


def test_a_single_answer_has_no_history(make_reward_batch):
    batch = make_reward_batch()
    term = HistoryRepetition(HistoryRepetitionConfig())
    assert term(batch).tolist() == [0.0] * len(batch.episodes.ids)


def test_the_age_of_a_message_counts_exchanges():
    from cagsr.prompts.chat import Place, spoken_in

    roles = ["user", "assistant", "tool", "assistant", "user", "tool"]
    messages = [{"role": role, "content": "x"} for role in roles]
    places = tuple(Place(n, n + 1, 0) if n != 1 else None for n in range(6))
    found = spoken_in(messages, places)
    assert found[0] == Spoken(0, 1, "user", 1)
    assert [(one.role, one.age) for one in found] == [
        ("user", 1), ("tool", 0), ("assistant", 0), ("user", 0), ("tool", 0)
    ]  # fmt: skip


def test_segments_of_nobody_we_know_weigh_as_others():
    assert SalienceConfig(other_weight=0.5).role_weight("tool") == 0.5
    assert Segment((1,), "x", "assistant", 0, sampled=True).words == ()
