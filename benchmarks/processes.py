"""Two processes against one: tokens per second of ``cagsr train`` with the same global batch, a core and a thread each.

``python -m benchmarks.processes`` runs the real command alternately with one and with two gloo processes, reads their
``timings.jsonl`` and prints the ratio. It needs two idle cores: on a busy machine it measures the others' work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from benchmarks.capture import MODELS

BAR = 1.7
PHASES = ("collect_seconds", "update_seconds", "evaluation_seconds")
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}


@dataclass(frozen=True)
class Case:
    """A model and the work of a step."""

    name: str
    model: dict[str, int]
    vocabulary: int
    prompts: int
    generations: int
    prompt_tokens: int
    response_tokens: int
    micro_batch: int
    steps: int
    """The first is not counted."""


FULL = Case("30M", MODELS["30M"], 8192, 8, 8, 64, 64, 16, 2)
SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
FAST = Case("4M", SMALL, 1024, 8, 4, 32, 32, 16, 3)


@dataclass(frozen=True)
class Run:
    """What one run took in its counted steps, all processes together."""

    processes: int
    tokens: float
    """Response tokens."""
    collect_seconds: float
    update_seconds: float
    evaluation_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Response tokens by the time of the steps; the evaluation apart, which a run makes in one of many steps."""
        return self.tokens / (self.collect_seconds + self.update_seconds)


def prepare(folder: Path, case: Case) -> None:
    """Write a random model, its tokenizer and prompts of equal length; it all but never ends an answer by itself."""
    words = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(case.vocabulary - 3))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer.save_pretrained(folder / "start")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        max_position_embeddings=case.prompt_tokens + case.response_tokens,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        num_key_value_heads=case.model["num_attention_heads"],
        **case.model,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "start")
    drawn = random.Random(0)
    rows = [{"prompt": " ".join(drawn.choices(words[3:], k=case.prompt_tokens))} for _ in range(64)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(folder: Path, case: Case, processes: int, cores: list[int], *, sharded: bool) -> Run:
    """Train for a few steps with this many processes, each with a core and a thread.

    Raises:
        RuntimeError: the run failed; the message holds what it said.
    """
    flags = {
        "--model": folder / "start",
        "--model.device": "cpu",
        "--data": folder / "prompts.jsonl",
        "--output_dir": folder / "run",
        "--run.overwrite": "True",
        "--steps": case.steps,
        "--run.batch_size": case.prompts,
        "--run.save_every": 0,
        "--num_generations": case.generations,
        "--max_new_tokens": case.response_tokens,
        "--sampling.min_new_tokens": case.response_tokens,  # equal work for all
        "--ppo.micro_batch_size": case.micro_batch,
        "--evaluation.held_out": 8,
        "--evaluation.every": 0,
    }
    command = ["-m", "cagsr.commands.main", "train", *(str(part) for pair in flags.items() for part in pair)]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command = [*launcher, "--master_addr", "127.0.0.1", "--master_port", str(port), *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if sharded and processes > 1:
        environment |= FSDP2
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores[:processes])  # inherited
    try:
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    finally:
        os.sched_setaffinity(0, before)
    if done.returncode:
        raise RuntimeError(f"The run with {processes} processes failed: {(done.stdout + done.stderr)[-2000:]}")
    rows = [json.loads(line) for line in (folder / "run" / "timings.jsonl").read_text().splitlines()][1:]
    seconds = {phase: sum(row[phase] for row in rows) for phase in PHASES}
    return Run(processes, sum(row["response_tokens"] for row in rows), **seconds)


def summarise(pairs: list[tuple[Run, Run]]) -> dict[str, Any]:
    """Ratios of two processes to one, medians over the rounds: of tokens per second, and of each phase's speed."""
    found: dict[str, Any] = {
        "ratio": statistics.median(two.tokens_per_second / one.tokens_per_second for one, two in pairs)
    }
    for phase in PHASES:
        ratios = [getattr(one, phase) / getattr(two, phase) for one, two in pairs if getattr(two, phase) > 0]
        found[phase.replace("_seconds", "_ratio")] = statistics.median(ratios) if ratios else None
    found["tokens_per_second"] = {
        str(runs[0].processes): statistics.median(run.tokens_per_second for run in runs)
        for runs in zip(*pairs, strict=True)
    }
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; 0 where two processes are at least ``BAR`` times as fast as one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processes", description=__doc__)
    parser.add_argument("--fast", action="store_true", help="a 4M model: checks the benchmark, says little of speed")
    parser.add_argument(
        "--fsdp2", action="store_true", help="divide the weights of the two processes (FSDP2) instead of DDP"
    )
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs (default: 3)")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args(argv)
    cores = sorted(os.sched_getaffinity(0))
    console = Console(soft_wrap=True, highlight=False)
    if len(cores) < 2:
        console.print("Two processes need two cores, and there is one here.")
        return 2
    case = FAST if arguments.fast else FULL
    pairs: list[tuple[Run, Run]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, case)
        for number in range(arguments.rounds):
            order = (1, 2) if number % 2 == 0 else (2, 1)
            found = {n: run(folder, case, n, cores, sharded=arguments.fsdp2) for n in order}
            pairs.append((found[1], found[2]))
            speeds = " and ".join(f"{found[n].tokens_per_second:.1f} tokens/s with {n}" for n in (1, 2))
            console.print(f"round {number + 1} of {arguments.rounds}: {speeds}")
    result = summarise(pairs)
    phases = ", ".join(
        f"{phase} {result[f'{phase}_ratio']:.2f}"
        for phase in ("collect", "update", "evaluation")
        if result[f"{phase}_ratio"]
    )
    load = os.getloadavg()[0]
    console.print(
        f"{case.name}, {case.prompts} x {case.generations} answers of {case.prompt_tokens} + {case.response_tokens} tokens, "
        f"{'FSDP2' if arguments.fsdp2 else 'DDP'}: two processes are {result['ratio']:.2f} times as fast as one (bar {BAR}); "
        f"{phases}. Load of the machine at the end: {load:.1f}."
    )
    if arguments.json:
        runs = [{"one": asdict(one), "two": asdict(two)} for one, two in pairs]
        facts = {"torch": torch.__version__, "machine": platform.platform(), "load": load, "bar": BAR}
        written = {"case": asdict(case), "fsdp2": arguments.fsdp2, **result, "rounds": runs, **facts}
        arguments.json.write_text(json.dumps(written, indent=1) + "\n")
    return 0 if result["ratio"] >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
