"""``python -m benchmarks.long_prompts``: memory and time of scoring one long prompt, up to 32k tokens.

Plain forward, the prompt attention of all layers, the same pooled into words while it is read, and the eager maps as
far as they are tried. Every length in a process of its own; memory is the peak above the idle model, as in
``benchmarks.capture``. Writes JSON and a plot.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.capture import peak_of
from cagsr.attention import AttentionRegion, PromptAttentionReader

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
RESPONSE, WORDS = 128, 100
LAYERS, HEADS = 2, 4
EAGER_MOST = 4096
"""Beyond this the eager maps are not tried: at 16k they alone are 8 GiB, at 32k 32."""
LABELS = {
    "plain": "plain forward",
    "all": "all layers read",
    "words": f"read, pooled to {WORDS} words",
    "eager": "eager",
}


def measure(prompt: int) -> dict[str, dict[str, float]]:
    """MiB above the idle model and seconds of one forward of each variant."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=704, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=2, max_position_embeddings=prompt + RESPONSE, attn_implementation="sdpa",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).base_model.eval()
    reader = PromptAttentionReader(model, layers="all")

    def inputs_of(length: int) -> tuple[dict[str, torch.Tensor], AttentionRegion]:
        ids = torch.randint(10, 4096, (1, length + RESPONSE))
        region = AttentionRegion.left_padded(torch.ones(1, length), torch.ones(1, RESPONSE))
        return {"input_ids": ids}, region

    def run(variant: str, length: int) -> None:
        inputs, region = inputs_of(length)
        with torch.no_grad():
            if variant == "plain":
                model(**inputs, use_cache=False)
            elif variant == "eager":
                model.set_attn_implementation("eager")
                model(**inputs, use_cache=False, output_attentions=True)
                model.set_attn_implementation("sdpa")
            else:
                if variant == "words":  # every eighth token, two to a word, as long as there are words left
                    words = torch.full((1, length), -1)
                    picked = torch.arange(0, length, 8)[: 2 * WORDS]
                    words[0, picked] = torch.arange(len(picked)) // 2
                    region = region.pooled(words, WORDS)
                with reader.read(region) as reading:
                    model(**inputs, use_cache=False)
                assert reading.attention.isfinite().all()

    variants = [variant for variant in LABELS if variant != "eager" or prompt <= EAGER_MOST]
    for variant in variants:  # libraries allocate their own buffers at the first call
        run(variant, 64)
    found = {}
    for variant in variants:
        start = time.perf_counter()
        peak = peak_of(lambda variant=variant: run(variant, prompt))  # type: ignore[misc]
        found[variant] = {"mebibytes": peak, "seconds": time.perf_counter() - start}
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every length, print a line for each, write JSON and the plot."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_prompts", description=__doc__)
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="longest prompt in tokens (default: 32768)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="CPU threads (default: 2)")
    parser.add_argument(
        "--json", type=Path, default=Path("docs/figures/long_prompts.json"), help="numbers to this file"
    )
    parser.add_argument("--plot", type=Path, default=Path("docs/figures/long_prompts.svg"), help="plot to this file")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        sys.stdout.write(json.dumps(measure(arguments.one)) + "\n")
        return
    results = {}
    for prompt in (length for length in LENGTHS if length <= arguments.longest):
        command = [sys.executable, "-m", "benchmarks.long_prompts", "--one", str(prompt)]
        command += ["--threads", str(arguments.threads)]
        # Large blocks go back to the system as soon as they are freed: the peak is of what is held at once.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": str(arguments.threads)}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        results[prompt] = json.loads(done.stdout.splitlines()[-1])
        parts = [
            f"{name} {value['mebibytes']:.0f} MiB {value['seconds']:.2f} s" for name, value in results[prompt].items()
        ]
        sys.stdout.write(f"{prompt} + {RESPONSE}: {', '.join(parts)}\n")
        sys.stdout.flush()
    for path in (arguments.json, arguments.plot):
        path.parent.mkdir(parents=True, exist_ok=True)
    report = {"torch": torch.__version__, "threads": arguments.threads, "response": RESPONSE, "results": results}
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    plot(results, arguments.plot)


def plot(results: dict[int, dict[str, dict[str, float]]], path: Path) -> None:
    """Draw MiB over prompt tokens, both logarithmic, with what the eager maps alone would need."""
    matplotlib.use("Agg")
    matplotlib.rc("svg", fonttype="none", hashsalt="cagsr")  # what tools.compact_svg reads
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, label in LABELS.items():
        points = [(prompt, found[name]["mebibytes"]) for prompt, found in results.items() if name in found]
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    lengths = list(results)
    maps = [LAYERS * HEADS * (length + RESPONSE) ** 2 * 4 / 2**20 for length in lengths]
    axes.plot(lengths, maps, linestyle=":", color="gray", label="eager: its maps alone (computed)")
    axes.set(xscale="log", yscale="log", xlabel="prompt tokens", ylabel="MiB above the idle model")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
