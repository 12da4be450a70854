"""Short runs of every kind, recorded: what a rebuilding of the house must not move.

    python tests/recorded_runs.py FOLDER                    runs them with the ``cagsr`` that is imported here
    python tests/recorded_runs.py FOLDER --against BEFORE   ... and compares their metrics with those of another folder, bit for bit

Floating-point sums differ from machine to machine, so both folders must be made on the same one. What holds on every machine, to a
few digits, is in ``recorded/`` and is compared in ``test_recorded.py``. Prompts are those of E2E NLG in ``../shared``, or made up
with ``--made_up``; the models are small and random, so that every signal moves from the first step on.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

E2E = Path(__file__).parents[2] / "shared" / "data" / "e2e" / "train.jsonl"
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
EVERY_TERM = [
    *("--reward.coverage.weight", "1", "--reward.coverage.dense", "true", "--reward.copy_coverage.weight", "0.3"),
    *("--reward.grounded_coverage.weight", "0.5", "--reward.associated_coverage.weight", "0.7"),
    *("--reward.unsupported.weight", "-0.4", "--reward.associations.answers", "64", "--reward.mean_mass.weight", "0.1"),
    *("--reward.focus.weight", "0.2", "--reward.focus.entropy_floor", "0.1", "--reward.repetition.dense", "true"),
    *("--reward.self_certainty.weight", "0.1", "--reward.length.weight", "-0.1", "--reward.length.target", "6"),
]
LORA = ["--lora_r", "4"]
GAE, RLOO, GRPO = (["--ppo.estimator", name] for name in ("gae", "rloo", "grpo"))
RUNS: dict[str, tuple[str, int, list[str]]] = {
    "llama-gae-full": ("llama", 1, [*GAE, *EVERY_TERM]),
    "llama-rloo-lora": ("llama", 1, [*RLOO, *LORA, "--attention.source", "reference"]),
    "llama-grpo-shared": ("llama", 1, [*GRPO, "--ppo.kl_in", "loss", "--ppo.kl_estimator", "k3", "--sampling.top_p", "0.9"]),
    "llama-gae-critic": ("llama", 1, [*GAE, "--ppo.critic", "model", "--ppo.entropy_coef", "0.01"]),
    "llama-rloo-two": ("llama", 2, [*RLOO, *EVERY_TERM]),
    "llama-gae-two": ("llama", 2, [*GAE, "--ppo.kl_controller", "adaptive"]),
    "t5-gae-full": ("t5", 1, [*GAE, *EVERY_TERM]),
    "t5-rloo-lora": ("t5", 1, [*RLOO, *LORA]),
    "bart-gae-lora": ("bart", 1, [*GAE, *LORA, "--attention.source", "reference"]),
    "bart-rloo-full": ("bart", 1, [*RLOO, *EVERY_TERM]),
}  # fmt: skip


def prompts(made_up: bool) -> list[dict[str, str]]:
    """Forty-eight different prompts with an answer each."""
    if not made_up:
        if not E2E.exists():
            raise SystemExit(f"{E2E} is not there; record with --made_up, or link ../shared")
        found: dict[str, str] = {}
        for row in map(json.loads, E2E.read_text().splitlines()):
            found.setdefault(row["prompt"], row["completion"] if "completion" in row else row["references"][0])
        return [{"prompt": prompt, "completion": found[prompt]} for prompt in list(found)[:48]]
    rows = []
    for number in range(48):
        name, food, area = f"name{number % 7}", f"food{number % 5}", f"area{number % 3}"
        rows.append(
            {
                "prompt": f"name : {name} | eats : {food} | area : {area} | number : {number} =>",
                "completion": f"{name} in {area} has {food} .",
            }
        )
    return rows


def save(folder: Path, kind: str, rows: list[dict[str, str]]) -> None:
    """A small random model whose vocabulary is the words of the prompts and answers."""
    core = Tokenizer(models.WordLevel({}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    words = sorted(
        {word for row in rows for text in row.values() for word, _ in core.pre_tokenizer.pre_tokenize_str(text)}
    )
    core.model = models.WordLevel({word: number for number, word in enumerate([*SPECIAL, *words])}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    common = {"vocab_size": len(SPECIAL) + len(words), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {
        "d_model": 48,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
    }
    config: PretrainedConfig = {
        "llama": lambda: LlamaConfig(
            **common, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=256,
        ),
        "t5": lambda: T5Config(**common, d_model=48, d_kv=12, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0),
        "bart": lambda: BartConfig(
            **common, **sizes, encoder_ffn_dim=96, decoder_ffn_dim=96, max_position_embeddings=256, decoder_start_token_id=2,
            forced_eos_token_id=None,
        ),
    }[kind]()  # fmt: skip
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name and "shared" not in name:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(folder: Path, name: str, steps: int) -> None:
    """One run by the real command line, one thread, so that sums have one order."""
    kind, processes, flags = RUNS[name]
    launcher = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        launcher += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        launcher += ["--master_addr", "127.0.0.1", "--master_port", port]
    files = {"--model": folder / kind, "--data": folder / "prompts.jsonl", "--output_dir": folder / name}
    command = [
        *(*launcher, "-m", "cagsr.commands.main", "train", "--model.device", "cpu", "--run.steps", str(steps)),
        *(str(part) for pair in files.items() for part in pair),
        *("--run.batch_size", "4", "--num_generations", "4", "--max_new_tokens", "10", "--ppo.micro_batch_size", "6"),
        *("--reward.echo.weight", "0"),  # younger than the records, as are the defaults of the next three
        *("--reward.coverage.weight", "1", "--reward.grounded_coverage.weight", "0", "--attention.layers", "all"),
        *("--ppo.num_mini_batches", "2", "--ppo.num_ppo_epochs", "2", "--ppo.learning_rate", "1e-3"),
        *("--evaluation.held_out", "8", "--evaluation.every", "2", "--run.save_every", "0", "--run.overwrite", "true"),
        *flags,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")


def differences(now: Path, before: Path) -> list[str]:
    """Where two recorded ``metrics.jsonl`` differ, a line each."""
    rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in (now, before)]
    if len(rows[0]) != len(rows[1]):
        return [f"{len(rows[0])} rows instead of {len(rows[1])}"]
    return [
        f"step {old.get('step')}: {key} is {new.get(key)} instead of {old.get(key)}"
        for new, old in zip(*rows, strict=True)
        for key in sorted(new.keys() | old.keys())
        if new.get(key) != old.get(key)
    ]


def main() -> int:
    """Run, then compare; the exit status says whether anything moved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--against", type=Path, help="a folder made before")
    parser.add_argument("--made_up", action="store_true", help="made-up prompts, where ../shared is not there")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", nargs="*", default=list(RUNS), help="which runs")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    rows = prompts(given.made_up)
    (given.folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind in sorted({RUNS[name][0] for name in given.only}):
        save(given.folder / kind, kind, rows)
    moved = 0
    for name in given.only:
        run(given.folder, name, given.steps)
        found = (
            []
            if given.against is None
            else differences(given.folder / name / "metrics.jsonl", given.against / name / "metrics.jsonl")
        )
        moved += bool(found)
        print(
            f"{name}: "
            + ("recorded" if given.against is None else f"{len(found)} numbers moved" if found else "the same"),
            flush=True,
        )
        for line in found[:5]:
            print(f"  {line}", flush=True)
    return 1 if moved else 0


if __name__ == "__main__":
    raise SystemExit(main())
