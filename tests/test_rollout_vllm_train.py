"""``cagsr train --rollout.engine vllm`` against a server in a process of its own: a run, a killed server, two processes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

import apart
import tiny
from cagsr.commands.main import main
from vllm_server import serve, serving


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.save_model(tmp_path / "start")
    tiny.save_prompts(tmp_path / "prompts.jsonl")
    return tmp_path


def arguments(folder: Path, url: str, *more: str) -> list[str]:
    flags = {
        "--model": folder / "start",
        "--model.device": "cpu",
        "--data": folder / "prompts.jsonl",
        "--output_dir": folder / "run",
        "--run.batch_size": 2,
        "--num_generations": 3,
        "--max_new_tokens": 5,
        "--evaluation.held_out": 2,
        "--evaluation.every": 0,
        "--run.save_every": 1,
        "--ppo.learning_rate": 0.01,
        "--rollout.engine": "vllm",
        "--rollout.url": url,
        "--rollout.wait": 0,
        "--rollout.timeout": 30,
    }
    return ["train", *(str(part) for pair in flags.items() for part in pair), *more]


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_a_server_that_is_killed_ends_the_run_in_one_sentence_and_the_run_resumes(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with apart.Process(serve, str(folder / "start")) as server:
        url = server.wait_for(r"http://\S+(?=\n)").group()
        with apart.cagsr(*arguments(folder, url, "--steps", "400")) as run:
            deadline = time.monotonic() + apart.SECONDS
            while not (folder / "run" / "checkpoints" / "step-000002").is_dir() and time.monotonic() < deadline:
                assert run.status is None, run.said
                time.sleep(0.05)
            server.kill()
            assert run.wait(60) == 2
            said = run.said
    errors = [line for line in said.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert "Traceback" not in said
    assert f"vLLM server at {url} can't be reached" in errors[0]
    assert "go on from it with --resume" in errors[0]
    assert not (folder / "run" / "rollout-weights").exists()
    done = rows(folder)[-1]["step"]

    # Another server, which starts from the untrained model; the folder's run goes on where it was.
    with serving(folder / "start") as engine:
        assert main(arguments(folder, engine.url, "--steps", str(int(done) + 2), "--resume")) == 0
    found = rows(folder)
    assert [row["step"] for row in found] == list(range(int(done) + 3))
    assert all(row["sampling/sampling_logp_difference/mean"] < 1e-5 for row in found[1:])
    assert found[-1]["objective/kl_k3"] > 1e-3  # the policy has moved, and the server with it
    capfd.readouterr()


def test_a_server_that_is_not_there_is_refused_before_anything_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, "http://127.0.0.1:9", "--steps", "1")) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "http://127.0.0.1:9 can't be reached" in error
    assert "--rollout.url" in error
    assert not (folder / "run").exists()


def test_two_processes_share_one_server_and_its_failure(folder: Path) -> None:
    """Two steps go well; then the server's reply is unusable, which only the main process sees."""
    with serving(folder / "start", fault="nothing from the third on") as engine:
        given = arguments(folder, engine.url, "--steps", "3", "--run.batch_size", "4")
        with pytest.raises(AssertionError, match="step 3: The vLLM server gave 0 answers instead of 12") as failure:
            apart.together(2, apart.command, *given)
        asked, answers = engine.asked, engine.given
    said = str(failure.value).replace("\n", " ")
    assert f"The checkpoint {folder / 'run' / 'checkpoints' / 'step-000002'} is intact" in said
    assert "go on from it with --resume" in said
    assert not (folder / "run" / "rollout-weights").exists()
    found = rows(folder)
    assert [row["step"] for row in found] == [0, 1, 2]
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-4 for row in found[1:])
    prompts = [len(body["prompt"]) for path, body in asked if path == "/v1/completions"]
    assert prompts == [4, 4, 4]  # both processes' prompts in one request a step
    assert len([path for path, _ in asked if path == "/collective_rpc"]) == 3
    # Each process got the answers to its own prompts: those of its samples are answers given to that very prompt.
    given = {(tuple(one["prompt_token_ids"]), one["text"]) for one in answers}
    samples = [json.loads(line) for line in (folder / "run" / "samples.jsonl").read_text().splitlines()]
    assert samples
    for sample in samples:
        assert (tuple(tiny.tokenizer()(sample["prompt"]).input_ids), sample["completion"]) in given
