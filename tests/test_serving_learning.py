"""A server that learns while it serves: nothing lost, nothing of a wrong version, through a SIGKILL and back."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import apart
import tiny
from cagsr.serving.versions import Versions
from serve_client import Live, save_chat_model, served

REQUESTS, CLIENTS = 500, 8
TESTS = str(Path(__file__).parent)
SETTINGS = {
    "learning.idle_seconds": 0, "learning.when_busy": "nice", "learning.nice": 0, "learning.new_prompts": 8,
    "learning.steps": 3, "learning.batch_size": 4, "learning.kl": 1000, "lora_r": 4, "ppo.learning_rate": 0.03,
    "ppo.num_ppo_epochs": 2, "sampling.num_generations": 4, "sampling.max_new_tokens": 4,
    "reward.functions": "serve_client.says_the_prompt", "reward.grounded_coverage.weight": 0, "reward.echo.weight": 0,
    "reward.repetition.weight": 0, "monitors.entropy_action": "off", "monitors.entropy": 0, "monitors.repetition": 10,
    "monitors.repetition_action": "off", "monitors.ended_action": "off", "monitors.ended": 0,
    "monitors.length_drift_action": "off",
}  # fmt: skip
"""A training that surely learns something in three steps, and monitors that let it."""
FLAGS = [str(part) for name, value in SETTINGS.items() for part in (f"--{name}", value)]
PROMPTS = [
    f"tell me about the {colour} {what} near a house" for colour in ("red", "blue") for what in ("cat", "dog", "bird")
]


def _ask(live: Live, number: int) -> tuple[str, dict[str, Any]]:
    """A request with a prompt of its own, greedy, so that what must come is known."""
    prompt = f"{PROMPTS[number % len(PROMPTS)]} {'. ' * (number % 3)}".strip()
    return prompt, live.complete(prompt, temperature=0, max_tokens=2, logprobs=0, cagsr={"consent": number % 20 == 0})


def _expected(model: Any, tokenizer: Any, prompt: str) -> list[float]:
    """Log-probabilities of the two likeliest tokens behind a prompt."""
    ids, found = tokenizer(prompt, return_tensors="pt")["input_ids"], []
    for _ in range(2):
        with torch.no_grad():
            logprobs = model(ids).logits[0, -1].log_softmax(-1)
        found.append(float(logprobs.max()))
        ids = torch.cat([ids, logprobs.argmax()[None, None]], dim=1)
        if int(ids[0, -1]) == tokenizer.eos_token_id:
            return found[:-1]
    return found


@pytest.mark.timeout(560)  # two servers and two trainings: half a minute, on a machine that does nothing else
def test_500_requests_while_a_version_is_trained_and_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{Path(TESTS).parent / 'src'}:{TESTS}")
    model, folder = save_chat_model(tmp_path / "start"), tmp_path / "served"
    flags = (*FLAGS, "--learning.held_out", tiny.save_prompts(tmp_path / "held_out.jsonl"))

    # The first server is killed in the middle of a training, while clients send prompts.
    accepted: list[int] = []
    with served(model, folder, *flags) as live:
        over = threading.Event()

        def send() -> None:
            number = 0
            while not over.is_set():
                try:
                    accepted.append(
                        live.complete(PROMPTS[number % 6], max_tokens=1, cagsr={"consent": True})["cagsr"]["kept"]
                    )
                except (OSError, ValueError):
                    return  # it was killed
                number += 1

        clients = [threading.Thread(target=send) for _ in range(3)]
        for one in clients:
            one.start()
        while live.status()["learning"]["state"] != "training":
            time.sleep(0.05)
        [worker] = psutil.Process(live.process.pid).children()
        live.process.kill()
        live.process.wait()
        over.set()
        for one in clients:
            one.join()
        psutil.wait_procs([worker], timeout=20)
        assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE  # nobody would take what it makes

    # The second one has all that was accepted, and goes on with the training while it answers.
    with served(model, folder, *flags) as live:
        kept = {one["id"] for one in live.send("GET", "/cagsr/prompts")[1]["data"]}
        assert len(accepted) >= 8
        assert set(accepted) <= kept
        answers: list[tuple[str, dict[str, Any]]] = []
        with ThreadPoolExecutor(CLIENTS) as pool:
            answers += pool.map(lambda number: _ask(live, number), range(REQUESTS))
            while not any(one["cagsr"]["version"] for _, one in answers[-CLIENTS:]):
                told = live.status()["learning"]["last"]
                assert told.get("accepted", True), told
                answers += pool.map(lambda number: _ask(live, number), range(CLIENTS))
                time.sleep(0.2)  # it needs the processor too
        assert len({one["id"] for _, one in answers}) == len(answers)
        versions = {one["cagsr"]["version"] for _, one in answers}
        assert {0, 1} <= versions
        assert all(one["model"] == f"model@{one['cagsr']['version']}" for _, one in answers)

        # Each answer is that of the version it names: the log-probabilities are.
        tokenizer = AutoTokenizer.from_pretrained(model)
        by_version = {0: AutoModelForCausalLM.from_pretrained(model)}
        for number in versions - {0}:
            base = AutoModelForCausalLM.from_pretrained(model)
            by_version[number] = PeftModel.from_pretrained(base, str(folder / "versions" / f"{number:04d}"))
        known = {
            (number, prompt): _expected(policy, tokenizer, prompt)
            for number, policy in by_version.items()
            for prompt in {prompt for prompt, _ in answers}
        }
        some = answers[0][0]
        # The versions differ by far more than what each is held to.
        assert any(known[0, prompt] != pytest.approx(known[1, prompt], abs=0.02) for prompt, _ in answers)
        for prompt, one in answers:
            chances = one["choices"][0]["logprobs"]["token_logprobs"]
            assert chances == pytest.approx(known[one["cagsr"]["version"], prompt], abs=1e-3)

        # Why it was put in place, and the way back.
        [first, *_] = live.send("GET", "/cagsr/versions")[1]["versions"]
        assert (first["parent"], first["accepted"], first["why"]["steps"]) == (0, True, 3)
        assert first["why"]["reward"]["mean"] > 0
        assert not any(word in json.dumps(first) for word in ("tell", "house"))
        while (current := live.send("POST", "/cagsr/rollback")[1]["version"]) != 0:
            assert current in versions
        assert live.complete(some, temperature=0, max_tokens=1, cagsr={"consent": False})["model"] == "model@0"
        old = live.complete(some, model="model@1", temperature=0, max_tokens=2, logprobs=0)
        assert old["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(known[1, some], abs=1e-3)
        said = live.process.said
        assert "Version 1 serves now." in said
        assert not any(prompt in said for prompt in PROMPTS)
        assert (
            not (folder / "training").exists()
            or json.loads((folder / "training" / "job.json").read_text())["number"] > 1
        )


def test_a_training_ends_with_the_prompt_it_reads(tmp_path: Path) -> None:
    model, folder = save_chat_model(tmp_path / "start"), tmp_path / "served"
    flags = (
        "--learning.idle_seconds",
        0.3,
        "--learning.new_prompts",
        8,
        "--sampling.max_new_tokens",
        4,
        "--sampling.num_generations",
        2,
    )
    with served(model, folder, *flags, "--learning.held_out", tiny.save_prompts(tmp_path / "held_out.jsonl")) as live:
        kept = [
            live.complete(PROMPTS[number % 6], max_tokens=1, cagsr={"consent": True})["cagsr"]["kept"]
            for number in range(8)
        ]
        while live.status()["learning"]["state"] != "training":
            time.sleep(0.05)
        [worker] = psutil.Process(live.process.pid).children()
        # It stands still while somebody is answered: of several answers, as one may be over between two looks.
        long = threading.Thread(target=lambda: [live.complete(PROMPTS[0], max_tokens=50, n=16) for _ in range(5)])
        long.start()
        seen = set()
        while long.is_alive():
            seen.add(worker.status())
            time.sleep(0.002)
        assert psutil.STATUS_STOPPED in seen
        assert live.send("DELETE", f"/cagsr/prompts/{kept[0]}")[0] == 200
        while (folder / "training").exists():
            time.sleep(0.05)
        assert not worker.is_running()


def test_a_damaged_version_is_not_served(tmp_path: Path) -> None:
    model, folder = save_chat_model(tmp_path / "start"), tmp_path / "served"
    run, short = tmp_path / "run" / "final-adapter", ("--sampling.max_new_tokens", 8)
    run.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (run / name).write_bytes(b"half")
    versions = Versions(folder)
    versions.add(1, run.parent, {}, parent=0, trained=1)
    (folder / "token").write_text("t" * 43)
    with apart.cagsr("serve", "--model", model, "--folder", folder, "--port", 0, *short) as process:
        assert process.wait() == 2
        assert "is no adapter of" in process.said
    (versions.path(1) / "adapter_model.safetensors").write_bytes(b"hal")
    with apart.cagsr("serve", "--model", model, "--folder", folder, "--port", 0, *short) as process:
        assert process.wait() == 2
        assert "is not the file that was put in place, so version 1 isn't served" in process.said
    versions.roll_back()
    with served(model, folder, "--learning.no_enabled", *short) as live:
        assert live.complete(PROMPTS[0], max_tokens=1)["model"] == "model@0"
        status, answer = live.send("POST", "/v1/completions", {"model": "model@1", "prompt": PROMPTS[0]})
        assert (status, answer["error"]["type"]) == (503, "server_error")
        assert "isn't served" in answer["error"]["message"]
