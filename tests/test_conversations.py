"""Conversations: rows asked turn by turn, the user replayed or played, and a run over them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import apart
import tiny
from cagsr.commands.main import main
from cagsr.config import ConversationConfig, DataConfig, ModelConfig, SalienceConfig, TrainConfig, validate
from cagsr.errors import ConfigError, RolloutError
from cagsr.flow import EncodedPrompt, Episode, Prompt, Segment
from cagsr.prompts.load import load_rows
from cagsr.rollout.played_user import ModelSpeaker, conversation_task
from cagsr.tasks.conversation import Messages, PlayedUser, Replay
from cagsr.tasks.history import prompt_before
from cagsr.tasks.segments import SegmentEncoder
from cagsr.tasks.task import replies_of
from chat_server import serve
from test_tasks import chat_model, encoder_of, ids_of


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def episode(
    columns: dict[str, Any] | None = None, answers: Sequence[str] = ("a1",), replies: Sequence[str] = ()
) -> Episode:
    prompt = Prompt(3, "…", messages=({"role": "system", "content": "be kind"}, user("u0")), columns=columns or {})
    said: list[Segment] = []
    for turn, text in enumerate(answers):
        said.append(Segment((1,), text, "assistant", turn, sampled=True))
        if turn < len(replies):
            said.append(Segment((2,), replies[turn], "user", turn + 1, sampled=False))
    return Episode(EncodedPrompt(prompt, (1,), (0,), (1.0,)), tuple(said), True)


# ---- data ----


def test_rows_are_asked_turn_by_turn(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    system, tool = {"role": "system", "content": "s"}, {"role": "tool", "content": "t"}
    rows = [
        {"messages": [system, user("u0"), bot("a0"), user("u1"), bot("call"), tool, bot("a1"), user("u2")], "id": 1},
        {"turns": ["u0", "u1"], "id": 2},
        {"turns": ["u0"], "id": 3},
        {"messages": [bot("hello")], "id": 4},
        {"prompt": "p", "user_turns": ["u1"], "id": 5},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [dict(row.values) for row in load_rows(DataConfig(str(path), messages="first_turn"))]
    assert found[0] == {
        "id": 1,
        "prompt": [system, user("u0")],
        "user_turns": ["u1", "u2"],
        "answers_by_turn": ["a0", "a1", None],
        "reference": "a0",
    }
    assert found[1] == {"id": 2, "prompt": [user("u0")], "user_turns": ["u1"]}
    assert found[2] == {"id": 3, "prompt": [user("u0")], "user_turns": []}
    assert found[3:] == rows[3:]  # nobody asks, or there is a prompt already
    last = [dict(row.values) for row in load_rows(DataConfig(str(path), limit=1))]
    assert [len(row["prompt"]) for row in last] == [8]  # as before: a conversation that ends with the user is a prompt


@pytest.mark.parametrize(
    ("name", "count", "turns"), [("mt_bench/question.jsonl", 80, 1), ("dialogues/train.jsonl", 1500, 1)]
)
def test_the_shared_data_is_asked_turn_by_turn(name: str, count: int, turns: int):
    path = Path(__file__).parents[2] / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"{path} is absent")
    found = [row.values for row in load_rows(DataConfig(str(path), messages="first_turn"))]
    assert len(found) == count
    assert all(row["prompt"][-1]["role"] == "user" for row in found)
    assert all(len(row["user_turns"]) >= turns for row in found)
    assert all(isinstance(text, str) and text for row in found for text in row["user_turns"])


def test_each_turn_has_its_own_reference():
    columns = {"reference": "a0", "answers_by_turn": ["a0", "a1"], "user_turns": ["u1", "u2"], "completion": "x"}
    told = episode(columns, answers=("x", "y", "z"), replies=("u1", "u2"))
    prompts = [prompt_before(told.first.prompt, told, turn) for turn in range(3)]
    assert [one.columns.get("reference") for one in prompts] == ["a0", "a1", None]
    assert [one.columns.get("completion") for one in prompts] == ["x", None, None]
    # What the data's user was answered is no reference where another one has asked something else.
    played = episode(columns, answers=("x", "y"), replies=("other",))
    assert prompt_before(played.first.prompt, played, 1).columns.get("reference") is None
    assert prompts[2].messages == (*(told.first.prompt.messages or ()), bot("x"), user("u1"), bot("y"), user("u2"))


# ---- who speaks ----


def test_a_replayed_user_says_what_he_said():
    replay = Replay(turns=3)
    rows = {"user_turns": ["u1", "u2", "u3"]}
    assert replay.reply(episode(rows)) == "u1"
    assert replay.reply(episode(rows, ("a", "b"), ("u1",))) == "u2"
    assert replay.reply(episode(rows, ("a", "b", "c"), ("u1", "u2"))) is None  # three turns
    assert replay.reply(episode({"user_turns": []})) is None
    assert replay.reply(episode()) is None
    parts = {"user_turns": [[{"type": "text", "text": "u"}, {"type": "text", "text": "1"}], [{"type": "image"}]]}
    assert replay.reply(episode(parts)) == "u1"
    with pytest.raises(RolloutError, match="row 3: what the user says in turn 3 is no text"):
        replay.reply(episode(parts, ("a", "b"), ("u1",)))


def test_a_played_user_reads_the_conversation_with_the_parts_exchanged():
    heard: list[Messages] = []

    def speaker(conversations: Sequence[Messages]) -> list[str]:
        heard.extend(conversations)
        return [" more? ", "thanks [END]", "  "][: len(conversations)]

    config = ConversationConfig(user="x", turns=2, instruction="be the user")
    task = PlayedUser(speaker, config)
    going, over = episode(), episode(None, ("a", "b"), ("u1",))
    assert replies_of(task, [over, going, going, going]) == [None, "more?", None, None]
    # The assistant's instructions are not the user's to read; nobody was asked of the one that had its turns.
    assert heard == [[user("be the user"), bot("u0"), user("a1")]] * 3
    assert task.reply(going) == "more?"


def test_a_model_that_plays_the_user_draws_from_the_run_s_generator(tmp_path: Path):
    chat_model(tmp_path / "user")
    config = ConversationConfig(user=str(tmp_path / "user"), max_new_tokens=6, instruction="tell me", turns=5)
    task = conversation_task(config, ModelConfig("unused", device="cpu"), [])
    assert isinstance(task, PlayedUser)
    assert isinstance(task.speaker, ModelSpeaker)
    assert not any(one.requires_grad for one in task.speaker.loaded.model.parameters())
    told = [episode(answers=("the red cat",)), episode(answers=("a dog",))]
    torch.manual_seed(1)
    first = replies_of(task, told)
    torch.manual_seed(1)
    assert replies_of(task, told) == first
    assert all(text for text in first)
    greedy = conversation_task(replace(config, temperature=0.0), ModelConfig("unused", device="cpu"), [])
    assert replies_of(greedy, told) == [replies_of(greedy, [one])[0] for one in told]  # type: ignore[arg-type]


def test_a_server_plays_the_user(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CAGSR_USER_API_KEY", "secret")
    with apart.served(serve, "said {last} {key} {body}") as url:
        config = ConversationConfig(user=url + "/v1", model_name="gpt", temperature=0.5, max_new_tokens=7, end="")
        task = conversation_task(config, ModelConfig("unused"), [])
        assert task is not None
        said = replies_of(task, [episode(answers=(f"a{number}",)) for number in range(20)])
    assert [str(text).split()[:4] for text in said] == [["said", f"a{n}", "Bearer", "secret"] for n in range(20)]
    body = json.loads(str(said[0]).split("secret ", 1)[1])
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("gpt", 0.5, 7)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ("403", "server that plays the user at .* refused /v1/chat/completions with status 403"),
        ("nothing", "gave no message"),
    ],
)
def test_a_server_that_does_not_answer_is_told_in_a_sentence(reply: str, message: str):
    with apart.served(serve, reply) as url:
        task = conversation_task(ConversationConfig(user=url), ModelConfig("unused"), [])
        with pytest.raises(RolloutError, match=message):
            replies_of(task, [episode()])  # type: ignore[arg-type]
    with pytest.raises(RolloutError, match=r"can't be reached .*--conversation\.user"):
        replies_of(task, [episode()])  # type: ignore[arg-type]


def test_what_can_not_be_played_is_refused(tmp_path: Path):
    assert conversation_task(ConversationConfig(), ModelConfig("unused"), []) is None
    with pytest.raises(ConfigError, match="no row has a second message of the user's"):
        conversation_task(ConversationConfig(user="replay"), ModelConfig("unused"), [episode({"user_turns": []}).first])
    tiny.save_model(tmp_path / "plain")
    told = replace(episode().first, prompt=replace(episode().first.prompt, messages=None))
    with pytest.raises(ConfigError, match="row 3 is plain text"):
        conversation_task(ConversationConfig(user="http://127.0.0.1:1"), ModelConfig("unused"), [told])
    with pytest.raises(ConfigError, match="its tokenizer has no chat template"):
        conversation_task(ConversationConfig(user=str(tmp_path / "plain")), ModelConfig("unused", device="cpu"), [])
    config = TrainConfig(ModelConfig("m"), DataConfig("d"), "run", conversation=ConversationConfig(user="replay"))
    with pytest.raises(ConfigError, match=r"give --data\.messages first_turn"):
        validate(config)
    both = replace(
        config, data=DataConfig("d", messages="first_turn"), rollout=replace(config.rollout, task="a.b", engine="vllm")
    )
    with pytest.raises(ConfigError, match="both say how an episode goes on"):
        validate(both)
    with pytest.raises(ConfigError, match=r"--conversation\.user: episodes of several turns are sampled by"):
        validate(replace(both, rollout=replace(config.rollout, engine="vllm")))


def test_an_answer_that_a_stop_string_ended_gets_the_template_s_end_of_turn(tmp_path: Path):
    chat = chat_model(tmp_path)
    encoder: SegmentEncoder = encoder_of(chat)
    end = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    from cagsr.prompts.prepare import encode_texts

    (prompt,) = encode_texts([[user("the red cat")]], chat.tokenizer, SalienceConfig(weighting="uniform"), 50)
    cut = Segment(tuple(ids_of(chat, "a dog")), "a dog", "assistant", 0, sampled=True)
    whole = replace(cut, ids=(*cut.ids, end))
    first, second = (encoder.reply(Episode(prompt, (one,), True), "big house") for one in (cut, whole))
    assert first.ids == (end, *second.ids)


# ---- a run ----


def flags(folder: Path, run: str, **more: Any) -> list[str]:
    given = {
        "--model": folder / "start",
        "--model.device": "cpu",
        "--data": folder / "talks.jsonl",
        "--data.messages": "first_turn",
        "--output_dir": folder / run,
        "--conversation.user": "replay",
        "--conversation.turns": 3,
        "--steps": 3,
        "--run.batch_size": 2,
        "--num_generations": 2,
        "--max_new_tokens": 6,
        "--sampling.stop_strings": ["the", "a", "dog", "cat"],  # a random model hardly ever ends an answer
        "--evaluation.held_out": 2,
        "--evaluation.every": 1,
        "--evaluation.samples": 8,
        "--ppo.estimator": "rloo",
        "--ppo.turn_discount": 0.5,
        "--salience.weighting": "uniform",
        "--salience.turn_decay": 0.5,
        "--reward.coverage.weight": 1,
        "--reward.history_repetition.weight": -0.5,
        "--reward.history_repetition.n": 1,
        "--run.save_every": 1,
        "--run.sample_rows": 16,
        **more,
    }
    return [
        "train",
        *(
            str(part)
            for name, value in given.items()
            for part in [name, *(value if isinstance(value, list) else [value])]
        ),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("talks")
    (folder / "start").mkdir()
    chat_model(folder / "start")
    rows = []
    for number in range(8):
        colour, animal = ("red", "blue", "green")[number % 3], ("cat", "dog", "bird", "tree")[number % 4]
        talk = [user(f"a {colour} {animal}"), bot("a house"), user("near a tree"), bot("the cat"), user("big dog")]
        rows.append({"messages": talk})
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_run_over_conversations(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(flags(folder, "whole")) == 0
    assert "the user's first message is the prompt, what he says later is for" in capsys.readouterr().out
    samples = [json.loads(line) for line in (folder / "whole" / "samples.jsonl").read_text().splitlines()]
    talks = [row for row in samples if len(row.get("segments", ())) == 5]
    assert talks
    for row in talks:
        assert [one["role"] for one in row["segments"]] == ["assistant", "user"] * 2 + ["assistant"]
        assert [one["content"] for one in row["segments"][1::2]] == ["near a tree", "big dog"]
        assert sum(row["by_turn"]) == pytest.approx(row["reward"], abs=1e-5)
    # Each answer of the held-out conversations is judged, with what was said before it and the data's answer as its reference.
    held_out = [json.loads(line) for line in (folder / "whole" / "held_out.jsonl").read_text().splitlines()]
    assert any("near a tree" in row["prompt"] for row in held_out)
    metrics = [json.loads(line) for line in (folder / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert {"rewards/history_repetition/mean", "rewards/coverage/mean"} <= metrics[-1].keys()


def test_a_resumed_run_over_conversations_is_the_uninterrupted_one(folder: Path):
    assert main(flags(folder, "uninterrupted")) == 0
    with pytest.MonkeyPatch.context() as patch:
        from cagsr.training import step as steps

        taken = steps.Steps.step

        def until_two(self: Any, number: int, *rest: Any) -> Any:
            if number == 3:
                raise KeyboardInterrupt
            return taken(self, number, *rest)

        patch.setattr(steps.Steps, "step", until_two)
        assert main(flags(folder, "resumed")) != 0
    assert main([*flags(folder, "resumed"), "--resume"]) == 0
    for name in ("metrics.jsonl", "samples.jsonl", "held_out.jsonl"):
        assert (folder / "resumed" / name).read_text() == (folder / "uninterrupted" / name).read_text()


def test_a_run_with_a_played_user_is_repeatable(folder: Path):
    more = {"--conversation.user": folder / "start", "--data.messages": "first_turn", "--conversation.max_new_tokens": 4,
            "--conversation.instruction": "tell me",
            "--conversation.end": "tree", "--steps": 1}  # fmt: skip
    assert main(flags(folder, "played", **more)) == 0
    assert main(flags(folder, "again", **more)) == 0
    samples = (folder / "played" / "samples.jsonl").read_text()
    assert samples == (folder / "again" / "samples.jsonl").read_text()
    assert any(len(json.loads(line).get("segments", ())) >= 3 for line in samples.splitlines())
