"""One user's 300 prompts: does a server that learns from them answer that user better, and everybody else no worse?

    python -m examples.serve.personalise --model start --prompts unlabelled.jsonl --test test.jsonl --domain "area: riverside" \
        --config examples/e2e/cagsr.yaml examples/serve/personalise.yaml --metrics examples.e2e.rewards.hits --work runs/personal

starts ``cagsr serve``, sends the prompts that hold the ``domain`` text, with consent, through the OpenAI-compatible addresses, lets
the server train, and has the base and the new version answer test prompts of the domain (the user's) and all others (the general
set), greedily and sampled. ``result.json`` in the work folder has the means and the differences over seeds and prompts, with 95 %
intervals. Each seed's numbers are kept beside its server's folder (``seed0.json``): one that is done is not done again.
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
from cagsr.support.atomic import write_text_atomically
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
    """Run each seed that isn't done, and write what was measured of all of them."""
    options.work.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in options.seeds:
        file = options.work / f"seed{seed}.json"
        if not file.exists():
            write_text_atomically(file, json.dumps(_seed(options, seed), indent=1) + "\n")
        results.append(json.loads(file.read_text(encoding="utf-8")))
    together = {name: _together([one[name] for one in results]) for name in ("domain", "general")}
    text = json.dumps({"seeds": options.seeds, **together}, indent=1) + "\n"
    write_text_atomically(options.work / "result.json", text)
    print(text)


def _together(seeds: Sequence[dict[str, dict[str, list[float]]]]) -> dict[str, Any]:
    """Of each measure the mean before and after, and the difference, over seeds and prompts."""
    found: dict[str, Any] = {}
    for name in seeds[0]:
        before, after = ([one[name][when] for one in seeds] for when in ("before", "after"))
        found[name] = {
            "before": asdict(mean_interval(before)),
            "after": asdict(mean_interval(after)),
            "difference": asdict(paired_difference(after, before)),
            "differences of each seed": [paired_difference(*pair).mean for pair in zip(after, before, strict=True)],
        }
    return found


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
            found[name] = _measured(options, client, before, after, some)
        return found
    finally:
        server.terminate()
        server.wait()


def _measured(
    options: Options, client: _Client, before: str, after: str, prompts: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
    """Of each measure, greedy and sampled, the values of both versions by prompt."""
    asked = [Prompt(number, text) for number, text in enumerate(prompts, start=1)]
    measures = [choose_metric(None, [EncodedPrompt(one, (), (), ()) for one in asked])]
    measures += [HeldOutMetric(path, import_dotted(path, "--metrics")) for path in options.metrics]
    found: dict[str, dict[str, list[float]]] = {}
    for how, n, temperature in (("greedy", 1, 0.0), ("sampled", options.samples, 1.0)):
        said = {
            when: client.answers(model, prompts, n=n, temperature=temperature)
            for when, model in (("before", before), ("after", after))
        }
        for measure in measures:
            found[f"{measure.name}, {how}"] = {when: _by_prompt(measure, asked, own) for when, own in said.items()}
        found[f"words, {how}"] = {
            when: [sum(len(text.split()) for text in texts) / len(texts) for texts in own] for when, own in said.items()
        }
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
