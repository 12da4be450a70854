"""Episodes of several turns: who says what, which tokens were sampled, what later answers may look at."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from cagsr.config import ModelConfig, SalienceConfig, SamplingConfig
from cagsr.errors import ConfigError, RolloutError
from cagsr.flow import EncodedPrompt, Episode, EpisodeBatch, PromptBatch, Segment
from cagsr.models.load import LoadedModel, load_model
from cagsr.prompts.prepare import encode_texts
from cagsr.prompts.salience import DocumentFrequency
from cagsr.rollout.episodes import EpisodePlayer
from cagsr.rollout.rows import episode_rows, prompt_batch
from cagsr.rollout.sample import sample_responses
from cagsr.rollout.turn_keys import TurnKeys, can_go_on
from cagsr.tasks.segments import SegmentEncoder
from cagsr.tasks.task import load_task, replies_of

UNIFORM = SalienceConfig(weighting="uniform")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Once:
    """Asks once more, in the given words, where the first answer holds a word."""

    def __init__(self, text: str = " and a dog .", where: str = "cat") -> None:
        self.text, self.where = text, where

    def reply(self, episode: Episode) -> str | None:
        return self.text if len(episode.answers) == 1 and self.where in episode.answers[0] else None


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(ModelConfig(str(tiny.save_model(tmp_path_factory.mktemp("llama"))), device="cpu"))


def encoder_of(loaded: LoadedModel, salience: SalienceConfig = UNIFORM) -> SegmentEncoder:
    return SegmentEncoder(loaded, salience, DocumentFrequency(1, {}))


def prompts_of(loaded: LoadedModel, *texts: str) -> list[EncodedPrompt]:
    return encode_texts(texts, loaded.tokenizer, UNIFORM, 50, None, source="here")


def ids_of(loaded: LoadedModel, text: str) -> list[int]:
    return loaded.tokenizer(text, add_special_tokens=False)["input_ids"]


def said(loaded: LoadedModel, texts: list[str], *, ended: bool = True) -> tuple[list[list[int]], bool]:
    return [[*ids_of(loaded, text), *([2] if ended else [])] for text in texts], ended


class Script:
    """Stands in for the engine: says what it is told, call by call, and keeps what it was asked."""

    def __init__(self, loaded: LoadedModel, *calls: list[tuple[str, bool]]) -> None:
        self.loaded, self.calls, self.asked = loaded, list(calls), []  # type: ignore[var-annotated]

    def __call__(self, batch: PromptBatch, *, keys: TurnKeys | None = None) -> EpisodeBatch:
        self.asked.append([ids[real].tolist() for ids, real in zip(batch.ids, batch.real, strict=True)])
        now = self.calls.pop(0)
        rows = [[*ids_of(self.loaded, text), *([2] if ended else [])] for text, ended in now]
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
        ended = torch.tensor([ended for _, ended in now])
        drawn = -torch.arange(1.0, width + 1).expand(ids.shape).masked_fill(~mask, 0.0)
        return EpisodeBatch.of_one_turn(batch, ids, mask, ended, tuple(text for text, _ in now), drawn)


def test_two_turns_by_hand(loaded: LoadedModel):
    prompts = prompts_of(loaded, "the red cat", "a big house")
    rows = [one for one in prompts for _ in range(2)]
    script = Script(
        loaded,
        [("cat .", True), ("dog .", True), ("a cat", False), ("the cat .", True)],
        [("dog", True), ("food", False)],
    )
    player = EpisodePlayer(loaded, Once(), encoder_of(loaded), room=100)
    batch = prompt_batch(loaded, prompts, 2)
    found = player(script, rows, batch)
    # Rows 0 and 3 go on: row 1 says no cat, and row 2 was cut, which ends an episode.
    first = [*rows[0].ids, *ids_of(loaded, "cat ."), 2, *ids_of(loaded, "and a dog .")]
    last = [*rows[3].ids, *ids_of(loaded, "the cat ."), 2, *ids_of(loaded, "and a dog .")]
    assert script.asked[1] == [first, last]
    reply = len(ids_of(loaded, "and a dog ."))
    assert [ids[real].tolist() for ids, real in zip(found.ids, found.real, strict=True)] == [
        [*ids_of(loaded, "cat ."), 2, *ids_of(loaded, "and a dog ."), *ids_of(loaded, "dog"), 2],
        [*ids_of(loaded, "dog ."), 2],
        ids_of(loaded, "a cat"),
        [*ids_of(loaded, "the cat ."), 2, *ids_of(loaded, "and a dog ."), *ids_of(loaded, "food")],
    ]
    assert found.sampled[0].tolist()[: 3 + reply + 2] == [True] * 3 + [False] * reply + [True] * 2
    assert found.turn[0].tolist()[: 3 + reply + 2] == [0] * 3 + [1] * (reply + 2)
    assert found.turn[3].tolist()[: 4 + reply + 1] == [0] * 4 + [1] * (reply + 1)
    assert found.sampled.sum(dim=1).tolist() == [5, 3, 2, 5]
    assert bool((found.sampled <= found.real).all())
    assert found.ended.tolist() == [True, True, False, False]
    assert found.completions == ("dog", "dog .", "a cat", "food")
    assert torch.equal(found.prompts.group, batch.group)
    # What the engine drew stays with its tokens; a reply was drawn by nobody.
    assert found.decoded_logprobs is not None
    assert found.decoded_logprobs[0].tolist()[: 3 + reply + 2] == [-1.0, -2.0, -3.0, *[0.0] * reply, -1.0, -2.0]


def test_words_of_what_was_said_before_are_the_context(loaded: LoadedModel):
    prompts = prompts_of(loaded, "the red cat")
    script = Script(loaded, [("big cat .", True)], [("dog", True)])
    found = EpisodePlayer(loaded, Once(), encoder_of(loaded), room=100)(script, prompts, prompt_batch(loaded, prompts))
    context = found.context
    assert context is not None
    width = found.prompts.ids.shape[1]
    names = loaded.tokenizer.convert_ids_to_tokens(found.context_ids[0].tolist())
    marked = [(name, int(word)) for name, word in zip(names, context.words[0], strict=True) if word >= 0]
    since = {name: int(context.word_turn[0, word]) for name, word in marked}
    # The prompt's words from the first answer on, the answer's own and the reply's from the second on, its own never (here).
    assert [name for name, _ in marked][: len(prompts[0].salience)] == names[1:width]
    assert since["red"] == 0
    assert since["big"] == 1
    assert since["and"] == 1
    assert names[-2] == "dog"
    assert int(context.word_turn[0, int(context.words[0, -2])]) == 2
    # Every segment numbers its own words, so none shares a number with another's.
    assert len({word for _, word in marked}) == int((context.salience[0] > 0).sum())


def test_rows_of_episodes_are_cut_to_their_own_length(loaded: LoadedModel):
    prompts = prompts_of(loaded, "the red cat near a big house", "a cat")
    script = Script(loaded, [("dog", True), ("cat", True)], [("a big dog .", True)])
    player = EpisodePlayer(loaded, Once(where="cat"), encoder_of(loaded), room=100)
    found = player(script, prompts, prompt_batch(loaded, prompts))
    part = episode_rows(found, torch.tensor([1]))
    assert found.context is not None
    assert part.context is not None
    width, cut = found.prompts.ids.shape[1], part.prompts.ids.shape[1]
    assert cut == len(prompts[1].ids) < width
    length = int(found.real[1].sum())
    assert part.ids.shape[1] == length
    assert part.context.words.shape == (1, cut + length)
    assert part.context.words[0, :cut].tolist() == found.context.words[1, width - cut : width].tolist()
    assert part.context.words[0, cut:].tolist() == found.context.words[1, width : width + length].tolist()
    assert part.context.episodes == (found.context.episodes[1],)


def test_one_turn_is_the_engine_s_own_batch(loaded: LoadedModel):
    prompts = prompts_of(loaded, "the red cat")
    script = Script(loaded, [("dog", True)])
    found = EpisodePlayer(loaded, Once(), encoder_of(loaded), room=100)(script, prompts, prompt_batch(loaded, prompts))
    assert found.context is None
    assert found.completions == ("dog",)


def test_an_episode_without_room_for_another_answer_is_over(loaded: LoadedModel):
    prompts = prompts_of(loaded, "the red cat")
    script = Script(loaded, [("cat", True)])
    player = EpisodePlayer(loaded, Once(), encoder_of(loaded), room=len(prompts[0].ids) + 5)
    assert player(script, prompts, prompt_batch(loaded, prompts)).context is None
    assert not script.calls


@pytest.mark.parametrize(
    ("kind", "window", "again"),
    [
        ("llama", None, False),
        ("qwen3", None, False),
        ("gpt2", None, False),
        ("gpt_neox", None, False),
        ("gemma3", 50, False),
        ("gemma3", 8, True),
        ("mistral", 6, True),
        ("lfm2", None, True),
    ],
)
def test_the_sampled_tokens_are_those_of_the_policy(kind: str, window: int | None, again: bool, tmp_path: Path):
    """With the real engine: an answer is drawn as if all before it were read anew, and keys that are there are not made again.

    ``again``: short windows and convolutions lose what was before, so there each turn reads all of it.
    """
    folder = tiny.save_model(tmp_path, kind)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ({} if window is None else {"sliding_window": window})))
    loaded = load_model(ModelConfig(str(folder), device="cpu"))

    class Always:
        def reply(self, episode: Episode) -> str | None:
            return " and a dog ." if len(episode.answers) < 3 else None

    prompts = prompts_of(loaded, "the red cat", "a big house sees the dog near a tree")
    rows = [one for one in prompts for _ in range(3)]
    sampling = SamplingConfig(num_generations=3, max_new_tokens=5)
    torch.manual_seed(3)
    # Answers that were cut would end their episodes: here each is taken for one that ended.
    player = EpisodePlayer(loaded, Always(), encoder_of(loaded), room=60)
    read: list[int] = []  # the most tokens of a forward, by turn
    loaded.model.get_input_embeddings().register_forward_hook(lambda _, ids, out: read.append(ids[0].shape[1]))
    widths: list[tuple[int, int]] = []

    def sample(batch: PromptBatch, *, keys: TurnKeys | None = None) -> EpisodeBatch:
        can_go_on(loaded.model)
        read.clear()
        found = sample_responses(loaded, batch, sampling, keys=keys)
        widths.append((batch.ids.shape[1], max(read)))
        return replace(found, ended=torch.ones_like(found.ended))

    found = player(sample, rows, prompt_batch(loaded, prompts, 3))
    reply = len(ids_of(loaded, "and a dog ."))
    assert widths[0][0] == widths[0][1]
    for all_of_it, at_once in widths[1:]:
        assert at_once == (all_of_it if again else reply + 1)  # the last answer's last token was sampled, never read
    assert int(found.turn.max()) == 2
    assert len(set(found.sampled.sum(dim=1).tolist())) > 1  # rows of different lengths
    assert found.decoded_logprobs is not None
    for row in range(len(rows)):
        ids = torch.cat([found.prompts.ids[row][found.prompts.real[row]], found.ids[row][found.real[row]]])
        with torch.no_grad():
            logprobs = loaded.model(input_ids=ids[None]).logits[0].log_softmax(dim=-1)
        start = int(found.prompts.real[row].sum())
        own = logprobs[start - 1 : -1].gather(1, ids[start:, None])[:, 0]
        sampled = found.sampled[row][found.real[row]]
        torch.testing.assert_close(
            own[sampled], found.decoded_logprobs[row][found.real[row]][sampled], atol=2e-4, rtol=1e-3
        )


def test_keys_are_not_kept_of_more_rows_than_are_in_memory_at_once(loaded: LoadedModel):
    batch = prompt_batch(loaded, prompts_of(loaded, "the red cat", "a big house"), 3)
    keys, sampling = TurnKeys(), SamplingConfig(num_generations=3, max_new_tokens=3)
    sample_responses(loaded, batch, sampling, batch_size=6, keys=keys)
    assert len(keys.rows) == 6
    assert all(one is not None and len(one.ids) >= 5 for one in keys.rows)
    keys.pick([4, 1])
    assert len(keys.rows) == 2
    sample_responses(loaded, batch, sampling, batch_size=3, keys=keys)
    assert keys.rows == []


def chat_model(folder: Path) -> LoadedModel:
    tiny.save_model(folder)
    tokenizer = load_model(ModelConfig(str(folder), device="cpu")).tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["user", "assistant"])
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return load_model(ModelConfig(str(folder), device="cpu"))


def test_a_chat_template_goes_on_from_the_sampled_answer(tmp_path: Path):
    """Prompt, answer and reply, token by token, are what the template writes of the whole conversation."""
    chat = chat_model(tmp_path)
    messages = [{"role": "user", "content": "the red cat"}]
    (prompt,) = encode_texts([messages], chat.tokenizer, UNIFORM, 50, None, source="here")
    end = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    answer = Segment((*ids_of(chat, "a dog"), end), "a dog", "assistant", 0, sampled=True)
    reply = encoder_of(chat).reply(Episode(prompt, (answer,), True), "big house")
    conversation = [
        *messages,
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": "big house"},
    ]
    whole = chat.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert [*prompt.ids, *answer.ids, *reply.ids] == ids_of(chat, whole)
    assert reply.text == "big house"
    # The template's own words are no words of the reply.
    words = chat.tokenizer.convert_ids_to_tokens([i for i, w in zip(reply.ids, reply.words, strict=True) if w >= 0])
    assert words == ["big", "house"]


def test_a_template_that_rewrites_the_past_is_refused(tmp_path: Path):
    chat = chat_model(tmp_path)
    chat.tokenizer.chat_template = "{{ messages | length }}" + CHATML
    (prompt,) = encode_texts(
        [[{"role": "user", "content": "the red cat"}]], chat.tokenizer, UNIFORM, 50, None, source="here"
    )
    answer = Segment((5,), "a", "assistant", 0, sampled=True)
    with pytest.raises(RolloutError, match="writes row 1 otherwise once it goes on"):
        encoder_of(chat).reply(Episode(prompt, (answer,), True), "big house")


def test_a_task_that_fails_is_told_in_a_sentence(loaded: LoadedModel):
    episode = Episode(prompts_of(loaded, "the red cat")[0], (Segment((5,), "a", "assistant", 0, sampled=True),), True)

    class Broken:
        def reply(self, episode: Episode) -> str | None:
            raise KeyError("x")

    with pytest.raises(RolloutError, match=r"the task failed with KeyError: 'x' \(row 1, turn 1\)"):
        replies_of(Broken(), [episode])
    for bad in ("", 3):
        with pytest.raises(RolloutError, match="return a text, or None"):
            replies_of(type("Bad", (), {"reply": lambda self, episode, bad=bad: bad})(), [episode])


def test_what_is_no_task_is_refused():
    assert load_task(None) is None
    with pytest.raises(ConfigError, match="a task has a method reply"):
        load_task("collections.OrderedDict")
    with pytest.raises(ConfigError, match="names no module"):
        load_task("no_such_module.Task")


def test_an_encoder_decoder_model_is_refused(tmp_path: Path):
    t5 = load_model(ModelConfig(str(tiny.save_model(tmp_path, "t5")), device="cpu"))
    with pytest.raises(ConfigError, match="needs a decoder-only model"):
        EpisodePlayer(t5, Once(), encoder_of(t5), room=10)
