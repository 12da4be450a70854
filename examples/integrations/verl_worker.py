"""verl's own reward loop with the attention reward: two of verl's reward workers, and one worker with the model for both.

Needs verl and ray. verl's configuration is composed as its trainer does; no policy is sampled, the answers are given.

python -m examples.integrations.verl_worker --output_dir verl-run
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from examples.integrations import tiny_model
from examples.integrations.apart import write_settings
from examples.integrations.verl_reward import ANSWERS


def overrides(model: Path, settings: Path, workers: int) -> list[str]:
    """What is said on verl's command line."""
    return [
        f"actor_rollout_ref.model.path={model}",
        f"reward.num_workers={workers}",
        "reward.reward_manager.source=importlib",
        "reward.reward_manager.name=AttentionRewardManager",
        "reward.reward_manager.module.path=pkg://cagsr.integrations.verl_worker",
        f"+reward.reward_kwargs.config={settings}",
    ]


def batch(tokenizer: Any, prompt: list[dict[str, str]], answers: Sequence[str]) -> Any:
    """Answers to one prompt as verl's agent loop hands them over: prompts padded on the left, answers on the right."""
    from tensordict import TensorDict
    from verl import DataProto

    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    said = [[*tokenizer(one, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for one in answers]
    width = max(map(len, said))
    rows = {
        "prompts": [[tokenizer.pad_token_id, *ids] for _ in said],
        "responses": [one + [tokenizer.pad_token_id] * (width - len(one)) for one in said],
        "attention_mask": [[0, *[1] * (len(ids) + len(one)), *[0] * (width - len(one))] for one in said],
    }
    tensors = TensorDict({name: torch.tensor(value) for name, value in rows.items()}, batch_size=len(said))
    prompts = np.empty(len(said), dtype=object)
    prompts[:] = [prompt] * len(said)
    return DataProto(batch=tensors, non_tensor_batch={"raw_prompt": prompts, "__num_turns__": np.full(len(said), 2)})


def main(arguments: list[str] | None = None) -> Any:
    """Have verl's reward loop judge two answers, and print their terms; returns the DataProto that verl's trainer gets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    options = parser.parse_args(arguments)

    import ray
    import verl
    from hydra import compose, initialize_config_dir
    from verl.experimental.reward_loop import RewardLoopManager

    folder = options.output_dir.absolute()
    model, prompts = tiny_model.save(folder, conversations=True)
    settings = write_settings(folder, model, prompts)
    place = Path(verl.__file__).parent / "trainer" / "config"
    with initialize_config_dir(str(place), version_base=None):
        config = compose("ppo_trainer", overrides(model, settings, workers=2))
    prompt = json.loads(prompts.read_text(encoding="utf-8").splitlines()[0])["prompt"]
    ray.init(num_cpus=3, include_dashboard=False)
    try:
        asked = batch(AutoTokenizer.from_pretrained(model), prompt, ANSWERS)
        loop = RewardLoopManager(config)  # its workers end with it
        found = loop.compute_rm_score(asked)
        actors = ray.util.list_named_actors()
    finally:
        ray.shutdown()
    for row, answer in enumerate(ANSWERS):
        terms = ", ".join(
            f"{name} {found.non_tensor_batch[name][row]:.3f}" for name in found.meta_info["reward_extra_keys"]
        )
        print(f"{answer!r}: {terms}; at token {int(found.batch['rm_scores'][row].ne(0).nonzero()[-1])}")
    print(f"workers: {', '.join(sorted(actors))}")
    return found


if __name__ == "__main__":
    main()
