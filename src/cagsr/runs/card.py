"""The final model: Hugging Face layout with a model card that states method, data, metrics and limits."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from transformers import GenerationConfig

from cagsr.atomic import delete, replace_folder, write_text_atomically
from cagsr.models.load import LoadedModel
from cagsr.runs.saved import DIFFERS, Probe, Saved, save_adapter_compared, save_compared


@dataclass(frozen=True)
class CardFacts:
    """What the card of a trained model tells."""

    name: str
    """Title: the run's name."""
    base_model: str
    """Folder or Hub id of the starting model."""
    data: str
    """Where the prompts came from."""
    prompts: int
    """How many prompts there were."""
    steps: int
    """Steps trained."""
    command: str
    """The command line that repeats the run."""
    settings: Mapping[str, Any]
    """The settings worth telling, flat: dotted key and value."""
    estimator: str = "gae"
    """How advantages were estimated: gae (PPO), rloo or grpo."""
    pipeline_tag: str = "text-generation"
    """The Hub's name for what the model does."""
    before: Mapping[str, float] = field(default_factory=dict)
    """Held-out metrics of the starting model."""
    after: Mapping[str, float] = field(default_factory=dict)
    """The same of the trained one."""
    held_out: int = 0
    """On how many held-out prompts they were measured."""
    warnings: Sequence[str] = ()
    """What the monitors said."""
    saved: str = "- The trained weights."
    """What was saved and how near it is to what was trained, as a list."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the packages that matter."""


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

_ESTIMATORS = {
    "gae": "PPO with a value function and generalised advantage estimation",
    "rloo": "PPO's clipped objective with leave-one-out advantages (RLOO)",
    "grpo": "PPO's clipped objective with group-normalised advantages (GRPO)",
}


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"| {' | '.join('---' for _ in header)} |"]
    lines += [f"| {' | '.join(_cell(value) for value in row)} |" for row in rows]
    return "\n".join(lines)


def _results(facts: CardFacts) -> str:
    names = [name for name, value in facts.before.items() if value is not None and facts.after.get(name) is not None]
    if not names:
        return "No held-out metrics were measured in this run."
    rows = [
        [name, facts.before[name], facts.after[name], f"{facts.after[name] - facts.before[name]:+.4g}"]
        for name in names
    ]
    measured = f"Measured on {facts.held_out} held-out prompts, one run, one seed.\n\n" if facts.held_out else ""
    return measured + _table(["metric", "before", "after", "change"], rows)


def model_card(facts: CardFacts) -> str:
    """Write the card of a trained model as Markdown with the Hub's YAML header."""
    header: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": facts.pipeline_tag,
        "tags": ["cagsr", "ppo" if facts.estimator == "gae" else facts.estimator, "self-rewarded"],
    }
    # The Hub resolves base_model, so a local path must not stand there.
    if _HUB_ID.fullmatch(facts.base_model) and not Path(facts.base_model).exists():
        header["base_model"] = facts.base_model
    warnings = "\n".join(f"- {sentence}" for sentence in facts.warnings) or "None of the monitors fired."
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# {facts.name}

`{facts.base_model}`, trained further with [CAGSR](https://arxiv.org/abs/2502.10482) for {facts.steps} steps.

## Method

The model answered unlabelled prompts, and each answer was rewarded by how well the model's own attention, while it
wrote the answer, covered the words of the prompt that matter, together with the other terms in the settings below.
No reference answers, no reward model and no human judgements were used unless the settings name one.
The policy was updated with {_ESTIMATORS.get(facts.estimator, facts.estimator)},
held near the starting model by a KL penalty.

## Data

{facts.prompts} prompts from `{facts.data}`, without answers.

## Results

{_results(facts)}

## What is in the files

{facts.saved}

## Limits

- The reward measures what the model looks at, not whether what it says is true: it does not see invented facts.
- Training by any reward of this kind makes the model's choices more peaked, and a more peaked model sampled at the same
  temperature scores better for that reason alone. The table above does not separate this from better answers: compare
  greedy answers, or the starting model at a temperature that gives the same entropy.
- One run with one seed says little about the spread between seeds.
- What the starting model gets wrong or does to people (bias, unsafe text) is not mended here.

## Warnings during training

{warnings}

## Settings

{_table(["setting", "value"], [[f"`{key}`", value] for key, value in facts.settings.items()])}

## Reproduce

```
{facts.command}
```
{f"{chr(10)}Versions: {versions}.{chr(10)}" if versions else ""}"""


def save_final(
    folder: Path,
    model: Any,
    loaded: LoadedModel,
    probe: Probe,
    card: Callable[[Saved], str],
    dtype: torch.dtype,
    generation: GenerationConfig | None = None,
) -> Saved:
    """Write the trained model with tokenizer, generation config and card to ``folder/final``, whole or not at all.

    With LoRA ``final`` holds the merged full model, loadable without peft, and ``final-adapter`` the adapter alone. Both are
    loaded again and compared with the model in memory, which is left as it was (``runs/saved.py``).

    Args:
        folder: the run folder.
        model: a transformers model or a ``PeftModel`` around one, unwrapped from accelerate.
        loaded: how it was loaded.
        probe: the texts it is compared on.
        card: makes the text of README.md.
        dtype: the precision it is saved in.
        generation: its generation config; None: the starting model's.

    Returns:
        What was saved; its folder is ``folder / "final"``.

    Raises:
        RunError: the disk is full, the folder can't be written, or what was saved is not what was trained; an earlier final
            model is untouched.
    """
    final, adapter, kept = folder / "final", folder / "final-adapter", folder / f"final-{DIFFERS}"
    delete(kept)
    if isinstance(model, PeftModel):
        with replace_folder(adapter) as temporary:
            save_adapter_compared(temporary, model, loaded, probe, place=adapter, kept=kept)
    with replace_folder(final) as temporary:
        saved = save_compared(temporary, model, loaded, probe, dtype, generation, place=final, kept=kept)
        text = card(saved)
        (temporary / "README.md").write_text(text, encoding="utf-8")
    if isinstance(model, PeftModel):
        write_text_atomically(adapter / "README.md", text)
    return saved
