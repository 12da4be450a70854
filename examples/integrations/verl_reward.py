"""verl's custom reward function, called as verl's reward manager calls it (verl itself is not needed).

python -m examples.integrations.verl_reward --output_dir verl-run
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from cagsr.integrations.frozen import VARIABLE
from examples.integrations import tiny_model
from examples.integrations.apart import import_file, write_settings

ANSWERS = ["the small red cat sees a house", "a dog likes food , a dog likes food , a dog likes food"]


def main(arguments: list[str] | None = None) -> list[dict[str, float]]:
    """Score two answers and print their terms; returns the scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    options = parser.parse_args(arguments)
    model, prompts = tiny_model.save(options.output_dir, conversations=True)
    os.environ[VARIABLE] = str(write_settings(options.output_dir, model, prompts))

    compute_score = import_file("cagsr.integrations.verl").compute_score
    prompt = json.loads(prompts.read_text(encoding="utf-8").splitlines()[0])["prompt"]
    # verl hands over no prompt: its parquet rows carry it in extra_info.
    row = {"data_source": "tiny", "ground_truth": None, "extra_info": {"index": 0, "prompt": prompt}}
    scores: list[dict[str, float]] = [compute_score(solution_str=answer, **row) for answer in ANSWERS]
    for answer, score in zip(ANSWERS, scores, strict=True):
        print(f"{answer!r}: " + ", ".join(f"{name} {value:.3f}" for name, value in score.items()))
    return scores


if __name__ == "__main__":
    main()
