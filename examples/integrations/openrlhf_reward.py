"""OpenRLHF's custom reward function, called as its single-turn executor calls it (OpenRLHF itself is not needed).

python -m examples.integrations.openrlhf_reward --output_dir openrlhf-run
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from cagsr.integrations.frozen import VARIABLE
from examples.integrations import tiny_model
from examples.integrations.apart import import_file, write_settings

ANSWERS = ["the small red cat sees a house <eos>", "a dog likes food , a dog likes food , a dog likes food"]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Score two answers and print their rewards; returns what ``reward_func`` gave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    options = parser.parse_args(arguments)
    model, prompts = tiny_model.save(options.output_dir, conversations=True)
    os.environ[VARIABLE] = str(write_settings(options.output_dir, model, prompts))

    reward_func = import_file("cagsr.integrations.openrlhf").reward_func
    messages = json.loads(prompts.read_text(encoding="utf-8").splitlines()[0])["prompt"]
    # OpenRLHF applies the chat template and hands over texts, special tokens included.
    prompt = AutoTokenizer.from_pretrained(model).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    found: dict[str, Any] = reward_func([prompt + answer for answer in ANSWERS], [prompt] * 2, [None] * 2)
    for answer, reward in zip(ANSWERS, found["rewards"].tolist(), strict=True):
        print(f"{answer!r}: {reward:.3f}")
    return found


if __name__ == "__main__":
    main()
