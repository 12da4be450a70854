"""One user's 300 prompts: does a server that learns from them answer that user better, and everybody else no worse?

    python -m examples.serve.personalise --model start --prompts unlabelled.jsonl --test test.jsonl --domain "area: riverside" \
        --config examples/e2e/cagsr.yaml examples/serve/personalise.yaml --metrics examples.e2e.rewards.hits --work runs/personal

starts ``cagsr serve``, sends the prompts that hold the ``domain`` text, with consent, through the OpenAI-compatible addresses, lets
the server train, and has the base and the new version answer test prompts of the domain (the user's) and all others (the general
set), greedily and sampled. ``result.json`` in the work folder has the means and the differences by prompt, with 95 % intervals.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tyro

from cagsr.evaluation.held_out import HeldOutMetric, choose_metric, judge
from cagsr.evaluation.intervals import mean_interval, paired_difference
from cagsr.flow import EncodedPrompt, Prompt
from cagsr.support.dotted_path import import_dotted

CLIENTS = 8
"""Requests at once."""


@dataclass(frozen=True)
class Options:
    """Personalise a small model and measure it."""

    model: str
    """The base."""
    prompts: Path
    """Prompts without answers, one user's among them."""
    test: Path
    """Prompts to measure on."""
    domain: str
    """A text that makes a prompt one of the user's."""
    work: Path
    """Folder for everything that is made."""
    config: list[Path] = field(default_factory=list)
    """Settings of cagsr serve."""
    associations: str | None = None
    """associations.json of a run, where the reward needs them."""
    count: int = 300
    """Prompts that the user sends."""
    measured: int = 200
    """Test prompts of the user's domain, and as many others."""
    samples: int = 2
    """Sampled answers to each, beside the greedy one."""
    max_tokens: int = 60
    """Longest answer."""
    metrics: list[str] = field(default_factory=list)
    """Dotted paths of f(prompts, completions, **columns) beside lexical relevance."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """A training each."""
    port: int = 8653
    """Of the server."""


def main(options: Options) -> None:
    """Run each seed, and write what was measured."""
    results = [_seed(options, seed) for seed in options.seeds]
    options.work.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1) + "\n"
    (options.work / "result.json").write_text(text, encoding="utf-8")
    print(text)


def _seed(options: Options, seed: int) -> dict[str, Any]:
    folder = options.work / f"seed{seed}"
    own, _ = _split(_prompts(options.prompts), options.domain)
    sets = dict(zip(("domain", "general"), _split(_prompts(options.test), options.domain), strict=True))
    command = [sys.executable, "-m", "cagsr.commands.main", "serve", "--model", options.model, "--folder", str(folder)]
    for file in options.config:
        command += ["--config", str(file)]
    command += ["--port", str(options.port), "--seed", str(seed), "--name", "policy"]
    if options.associations is not None:
        command += ["--reward.associations.path", options.associations]
    server = subprocess.Popen(command)
    try:
        client = _Client(options, folder)
        client.wait_for_server(server)
        before = client.get("/cagsr/status")["model"]
        client.answers(before, own[: options.count], n=1, temperature=1.0, cagsr={"consent": True})
        learned = client.wait_for_training(server)
        found: dict[str, Any] = {"seed": seed, "training": learned, "versions": client.get("/cagsr/versions")}
        after = client.get("/cagsr/status")["model"]
        for name, prompts in sets.items():
            some = prompts[: options.measured]
            found[name] = {"prompts": len(some), **_measured(options, client, before, after, some)}
        return found
    finally:
        server.terminate()
        server.wait()


def _measured(options: Options, client: _Client, before: str, after: str, prompts: Sequence[str]) -> dict[str, Any]:
    """Every metric of both versions, greedy and sampled: means, and the difference by prompt."""
    asked = [Prompt(number, text) for number, text in enumerate(prompts, start=1)]
    measures = [choose_metric(None, [EncodedPrompt(one, (), (), ()) for one in asked])]
    measures += [HeldOutMetric(path, import_dotted(path, "--metrics")) for path in options.metrics]
    found: dict[str, Any] = {}
    for how, n, temperature in (("greedy", 1, 0.0), ("sampled", options.samples, 1.0)):
        said = [client.answers(model, prompts, n=n, temperature=temperature) for model in (before, after)]
        for measure in measures:
            values = [_by_prompt(measure, asked, answers) for answers in said]
            found[f"{measure.name}, {how}"] = {
                "before": asdict(mean_interval(values[0])),
                "after": asdict(mean_interval(values[1])),
                "difference": asdict(paired_difference(values[1], values[0])),
            }
        lengths = [[sum(len(text.split()) for text in own) / len(own) for own in answers] for answers in said]
        found[f"words, {how}"] = asdict(paired_difference(lengths[1], lengths[0]))
    return found


def _by_prompt(measure: HeldOutMetric, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> list[float]:
    """The mean over the answers to each prompt."""
    by_answer = [judge(measure, prompts, [own[at] for own in answers]) for at in range(len(answers[0]))]
    return [sum(values) / len(values) for values in zip(*by_answer, strict=True)]


@dataclass(frozen=True)
class _Client:
    options: Options
    folder: Path

    def get(self, path: str) -> Any:
        return self._send(path, None)

    def answers(
        self, model: str, prompts: Sequence[str], *, n: int, temperature: float, **fields: Any
    ) -> list[list[str]]:
        """The answers to each prompt, ``CLIENTS`` prompts at a time."""

        def ask(numbered: tuple[int, str]) -> list[str]:
            number, prompt = numbered
            body = {"model": model, "prompt": prompt, "n": n, "temperature": temperature, "seed": number}
            reply = self._send("/v1/completions", {**body, "max_tokens": self.options.max_tokens, **fields})
            return [choice["text"] for choice in reply["choices"]]

        with ThreadPoolExecutor(CLIENTS) as pool:
            return list(pool.map(ask, enumerate(prompts)))

    def wait_for_server(self, server: subprocess.Popen[bytes]) -> None:
        while True:
            if server.poll() is not None:
                sys.exit("The server ended.")
            try:
                self.get("/cagsr/status")
                return
            except OSError:
                time.sleep(1)

    def wait_for_training(self, server: subprocess.Popen[bytes]) -> dict[str, Any]:
        """Wait until the server has trained once, and say what came of it."""
        while server.poll() is None:
            status: dict[str, Any] = self.get("/cagsr/status")["learning"]
            if status["last"]:
                return status
            time.sleep(2)
        sys.exit("The server ended.")

    def _send(self, path: str, body: Any) -> Any:
        token = (self.folder / "token").read_text(encoding="utf-8").strip()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.options.port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)


def _prompts(path: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]


def _split(prompts: Sequence[str], domain: str) -> tuple[list[str], list[str]]:
    """The user's, and the others; each once."""
    different = list(dict.fromkeys(prompts))
    return [one for one in different if domain in one], [one for one in different if domain not in one]


if __name__ == "__main__":
    main(tyro.cli(Options))
