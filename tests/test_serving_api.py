"""The server over real HTTP: what the openai package's client gets, what is kept, and who is turned away."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from cagsr.commands.main import main
from serve_client import Live, save_chat_model, served

PROMPT = "tell me about the red cat"
CHAT = [{"role": "user", "content": "tell me about the red cat"}]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("serve")
    model = save_chat_model(folder / "start")
    flags = ("--learning.no_enabled", "--limits.max_tokens", 40, "--sampling.max_new_tokens", 8, "--limits.answers", 6)
    with served(model, folder / "served", *flags) as found:
        yield found


@pytest.fixture(scope="module")
def client(live: Live) -> Any:
    openai = pytest.importorskip("openai", reason="openai is not installed (pip install openai)")
    return openai.OpenAI(base_url=f"http://127.0.0.1:{live.port}/v1", api_key=live.token, max_retries=0)


def test_the_openai_client_chats(client: Any) -> None:
    assert [one.id for one in client.models.list()] == ["model@0"]
    asked = {"model": "model", "messages": CHAT, "n": 2, "max_completion_tokens": 6, "seed": 3}
    found = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    again = client.chat.completions.create(**asked)
    texts = [choice.message.content for choice in found.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert texts[0] != texts[1]
    assert found.model == "model@0"
    assert found.usage.prompt_tokens == 8  # <bos> is the template's to write; user and . are words here
    for choice in found.choices:
        content = choice.logprobs.content
        assert len(content) == 6 or choice.finish_reason == "stop"
        for one in content:
            assert len(one.top_logprobs) == 2
            assert one.logprob <= one.top_logprobs[0].logprob
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    streamed = ["", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    assert chunks[-1].usage.completion_tokens == found.usage.completion_tokens
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.model for chunk in chunks} == {"model@0"}


def test_greedy_completions_are_the_models_own(client: Any, live: Live) -> None:
    folder = live.folder.parent / "start"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    tokens, chances = [], []
    for _ in range(5):
        with torch.no_grad():
            logprobs = model(ids).logits[0, -1].log_softmax(-1)
        tokens.append(int(logprobs.argmax()))
        chances.append(float(logprobs.max()))
        ids = torch.cat([ids, torch.tensor([[tokens[-1]]])], dim=1)
    found = client.completions.create(model="model@0", prompt=PROMPT, temperature=0, max_tokens=5, logprobs=1)
    choice = found.choices[0]
    assert choice.logprobs.tokens == [tokenizer.decode(token) for token in tokens]
    assert choice.logprobs.token_logprobs == pytest.approx(chances, abs=1e-4)
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (7, 5)
    assert choice.finish_reason == "length"
    word = choice.text.split()[2]
    stopped = client.completions.create(model="model", prompt=PROMPT, temperature=0, max_tokens=5, stop=[word])
    assert stopped.choices[0].text == choice.text[: choice.text.index(word)]
    assert stopped.choices[0].finish_reason == "stop"
    pieces = client.completions.create(
        model="model", prompt=PROMPT, temperature=0, max_tokens=5, stop=word, stream=True
    )
    assert "".join(one.choices[0].text for one in pieces if one.choices) == stopped.choices[0].text


def test_the_best_of_several_by_the_reward(client: Any) -> None:
    asked = {"model": "model", "prompt": PROMPT, "seed": 1, "max_tokens": 6}
    every = client.completions.create(**asked, n=6, extra_body={"cagsr": {"reward": True}})
    best = client.completions.create(**asked, n=2, best_of=6, user="ada", extra_body={"cagsr": {"reward": True}})
    told = every.cagsr["reward"]
    assert set(told[0]["terms"]) == {"grounded_coverage", "echo", "repetition"}
    for one in told:
        assert one["total"] == pytest.approx(sum(one["contributions"].values()))
    order = sorted(range(6), key=lambda place: -told[place]["total"])
    assert [one.text for one in best.choices] == [every.choices[place].text for place in order[:2]]
    assert best.usage.completion_tokens == every.usage.completion_tokens  # all were sampled
    assert best.cagsr["ignored"] == ["user"]
    assert every.cagsr["version"] == 0


def test_the_example_of_the_page_runs(client: Any, live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parent.parent / "docs/serve.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    code = code.replace("127.0.0.1:8643", f"127.0.0.1:{live.port}").replace(
        '"served/token"', repr(str(live.folder / "token"))
    )
    exec(code.replace('model="start"', 'model="model"').replace('"best_of": 8', '"best_of": 6'), {})
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3
    assert said[2] == "answered by version 0"
    [kept] = live.send("GET", "/cagsr/prompts")[1]["data"]
    assert live.send("DELETE", f"/cagsr/prompts/{kept['id']}")[0] == 200


def test_what_a_client_asks_for_wrongly_is_an_error_of_openai(client: Any) -> None:
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.NotFoundError, match="There is no such model here"):
        client.chat.completions.create(model="model@1", messages=CHAT)
    with pytest.raises(openai.BadRequestError, match="frequency_penalty: should be 0"):
        client.chat.completions.create(model="model", messages=CHAT, frequency_penalty=0.5)
    with pytest.raises(openai.AuthenticationError, match="Give the token"):
        client.with_options(api_key="wrong").models.list()


# ---- what is kept ----


def test_prompts_are_kept_with_consent_alone_and_go_one_by_one(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    yes, no = {"cagsr": {"consent": True}}, {"cagsr": {"consent": False}}
    assert live.complete("tell the house", max_tokens=1)["cagsr"]["kept"] is None
    assert live.complete("tell the house", max_tokens=1, **no)["cagsr"]["kept"] is None
    fields = {"model": "model", "prompt": "tell the tree", "max_tokens": 1}
    kept = [live.complete("tell the dog", max_tokens=1, n=2, **yes)]
    kept += [live.send("POST", "/v1/completions", fields, X_Cagsr_Consent="yes")[1]]
    both = live.send("POST", "/v1/completions", {**fields, **yes}, X_Cagsr_Consent="no")[1]
    assert both["cagsr"]["kept"] is None  # a no counts wherever it stands
    rows = live.send("GET", "/cagsr/prompts")[1]["data"]
    assert [(one["prompt"], one["answers"]) for one in rows] == [("tell the dog", 2), ("tell the tree", 1)]
    assert [one["id"] for one in rows] == [one["cagsr"]["kept"] for one in kept]
    first = rows[0]["id"]
    assert live.send("GET", f"/cagsr/prompts?after={first}")[1]["data"] == rows[1:]

    # Thumbs, and the pairs that are made of them beside the running server.
    completion = kept[0]["id"]
    for index, thumb in ((0, "up"), (1, "down")):
        assert live.send("POST", "/cagsr/feedback", {"id": completion, "index": index, "thumb": thumb})[0] == 200
    assert live.send("POST", "/cagsr/feedback", {"id": "cmpl-unknown", "thumb": "up"})[0] == 404
    texts = [choice["text"] for choice in kept[0]["choices"]]
    same = texts[0] == texts[1] or "" in texts
    capsys.readouterr()
    assert main(["serve", "pairs", "--folder", str(live.folder)]) == (2 if same else 0)
    if not same:
        [row] = map(json.loads, capsys.readouterr().out.splitlines())
        assert row == {"prompt": "tell the dog", "chosen": texts[0], "rejected": texts[1]}

    assert live.send("DELETE", f"/cagsr/prompts/{first}") == (
        200,
        {"id": first, "object": "cagsr.prompt", "deleted": True},
    )
    assert live.send("DELETE", f"/cagsr/prompts/{first}")[0] == 404
    assert main(["serve", "remove", "--id", str(rows[1]["id"]), "--folder", str(live.folder)]) == 0
    assert live.send("GET", "/cagsr/prompts")[1]["data"] == []


# ---- who is turned away ----

BODY = {"model": "model", "prompt": PROMPT, "max_tokens": 1}


@pytest.mark.parametrize(
    ("body", "headers", "status", "told"),
    [
        (BODY, {"Authorization": None}, 401, "Give the token"),
        (BODY, {"Authorization": "Bearer x"}, 401, "Give the token"),
        (BODY, {"Host": "evil.example:80"}, 421, "not the one that cagsr serve printed"),
        (BODY, {"Origin": "http://evil.example"}, 403, "other origins"),
        (BODY, {"Sec_Fetch_Site": "cross-site"}, 403, "other origins"),
        (BODY, {"Content_Type": "text/plain"}, 415, "must be JSON"),
        (BODY, {"X_Cagsr_Consent": "perhaps"}, 400, "say yes or no"),
        (b'{"model": "model", "prompt": "sesame', {}, 400, "not valid JSON"),
        (b"\xff\xfe", {}, 400, "not valid JSON"),
        ({**BODY, "prompt": "sesame " * 1_500_000}, {}, 413, "larger than 1,048,576 bytes"),
        ({**BODY, "prompt": "cat " * 60}, {}, 400, "The prompt has 61 tokens and the model's context 64"),
        ({**BODY, "prompt": "cat " * 100_000}, {}, 400, "more than the 63 that can be read"),
        ({**BODY, "prompt": "  "}, {}, 400, "empty"),
        ({**BODY, "max_tokens": 41}, {}, 400, "more than the 40 that may be asked for"),
        ({**BODY, "n": 7}, {}, 400, "7 answers are more than the 6"),
        ({**BODY, "n": 2, "best_of": 1}, {}, 400, "fewer than n"),
        ({**BODY, "best_of": 2, "stream": True}, {}, 400, "can't be streamed"),
        ({**BODY, "stop": ["a", ""]}, {}, 400, "an empty text"),
        *(
            ({**BODY, "model": name}, {}, 404, "There is no such model here")
            for name in (
                "../model",
                "model@../0",
                "model@00",
                "model@-1",
                "model@9",
                "model@1e3",
                "/etc/passwd",
                "model\0@0",
                "",
            )
        ),
    ],
    ids=lambda value: None,
)
def test_hostile_requests_get_a_clear_error(
    live: Live, body: Any, headers: dict[str, str], status: int, told: str
) -> None:
    if isinstance(body, dict) and body["prompt"] == "cat " * 60:
        body = {**body, "max_tokens": 4}
    found, answer = live.send("POST", "/v1/completions", body, **headers)
    assert found == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert told in answer["error"]["message"]
    assert "sesame" not in answer["error"]["message"]


def test_other_addresses_are_not_there(live: Live) -> None:
    for path in ("/", "/v1/models/../../token", "/v1/models/%2e%2e%2ftoken", "/token", "/cagsr/prompts/1/.."):
        status, answer = live.send("GET", path)
        assert status in (404, 405), path
        assert "error" in answer
    assert live.send("GET", "/v1/completions")[0] == 405
    assert live.send("POST", "/cagsr/rollback")[0] == 409  # nothing to go back to


def test_nothing_that_was_sent_is_in_the_output_and_the_folder_is_the_owners(live: Live) -> None:
    live.complete("tell sesame", max_tokens=1)
    said = live.process.said
    assert "Serving model@0 at" in said
    assert said.count(live.token) == 1  # once, when it was made
    assert not any(word in said for word in ("sesame", "red cat", "tell the dog", "Traceback"))
    assert live.folder.stat().st_mode & 0o077 == 0
    assert (live.folder / "token").stat().st_mode & 0o077 == 0


def test_a_client_that_leaves_ends_its_answer(live: Live) -> None:
    import socket

    content = json.dumps({**BODY, "max_tokens": 40, "n": 6, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{live.port}\r\nAuthorization: Bearer {live.token}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", live.port)) as leaving:
        leaving.sendall(head.encode() + content)
        assert leaving.recv(100).startswith(b"HTTP/1.1 200")
    assert live.complete(PROMPT, max_tokens=1)["usage"]["completion_tokens"] == 1


def test_a_folder_belongs_to_one_server_and_one_model(
    live: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(live.folder.parent / "start")
    assert main(["serve", "--model", model, "--folder", str(live.folder), "--port", "0"]) == 2
    assert "is being written by another process" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert main(["serve", "--model", model, "--folder", str(tmp_path / "mine"), "--port", "0"]) == 2
    assert "holds files that are not a server's" in capsys.readouterr().err
    assert main(["serve", "rollback", "--folder", str(tmp_path / "mine")]) == 2
    assert "no server's folder" in capsys.readouterr().err
    assert main(["serve", "--folder", str(tmp_path / "new")]) == 2
    assert "--model is missing" in capsys.readouterr().err
    other = tmp_path / "served"
    other.mkdir()
    (other / "token").write_text("t" * 40)
    (other / "base.json").write_text(json.dumps({"model": "another", "fingerprint": "0" * 64}))
    assert main(["serve", "--model", str(tiny.save_model(tmp_path / "m")), "--folder", str(other), "--port", "0"]) == 2
    assert "holds the versions of another model (another)" in capsys.readouterr().err
