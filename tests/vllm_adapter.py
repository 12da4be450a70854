"""What vLLM asks of an adapter's folder, so that its multi-LoRA takes it; vLLM itself is not needed.

Read in November 2026 from its loader: the configuration in vllm/lora/peft_helper.py, the tensors in vllm/lora/utils.py and
vllm/lora/lora_model.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors import safe_open

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` can be, vllm/config/lora.py; the default is 16."""


def refused(folder: Path, *, rank: int = RANKS[-1]) -> list[str]:
    """Why vLLM would not load the adapter, a reason each; ``rank``: its ``--max-lora-rank``."""
    config = json.loads((folder / "adapter_config.json").read_text())
    reasons = [name for name in ("r", "lora_alpha", "target_modules") if name not in config]
    if config.get("modules_to_save"):
        reasons.append("modules_to_save")
    if config.get("use_dora"):
        reasons.append("use_dora")
    if config.get("bias", "none") != "none":
        reasons.append("bias")
    if config["r"] > rank:
        reasons.append(f"r above {rank}")
    with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
        names = list(tensors.keys())
    return reasons + [name for name in names if not re.fullmatch(r"base_model\.model\.[\w.]+\.lora_[AB]\.weight", name)]
