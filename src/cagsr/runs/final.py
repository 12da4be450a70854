"""The final model: Hugging Face layout with a model card that states method, data, metrics and limits."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from peft import PeftModel
from transformers import GenerationConfig

from cagsr.models.load import LoadedModel
from cagsr.runs.saved import DIFFERS, Probe, Saved, save_adapter_compared, save_compared
from cagsr.support.atomic import delete, replace_folder, write_text_atomically

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def model_card(*, base_model: str, estimator: str, pipeline_tag: str, **facts: Any) -> str:
    """The card of a trained model as Markdown with the Hub's YAML header; ``card.md.jinja`` says what ``facts`` are."""
    header: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": pipeline_tag,
        "tags": ["cagsr", "ppo" if estimator == "gae" else estimator, "self-rewarded"],
    }
    # The Hub resolves base_model, so a local path must not stand there.
    if _HUB_ID.fullmatch(base_model) and not Path(base_model).exists():
        header["base_model"] = base_model
    written = yaml.safe_dump(header, sort_keys=False).strip()
    return render_card("card.md.jinja", header=written, base_model=base_model, estimator=estimator, **facts)


def render_card(template: str, **facts: Any) -> str:
    """A card as the template of that name has it."""
    environment = Environment(loader=PackageLoader("cagsr.runs", ""), undefined=StrictUndefined)
    environment.filters["cell"] = _cell
    return environment.get_template(template).render(**facts)


def _cell(value: Any) -> str:
    """A value in a table."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


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
    loaded again and compared with the model in memory, which is left as it was (``save_compared``, which says what the
    arguments are). ``card`` makes the text of README.md. Whatever fails, an earlier final model is untouched.
    """
    final, adapter, kept = folder / "final", folder / "final-adapter", folder / f"final-{DIFFERS}"
    delete(kept)
    if isinstance(model, PeftModel):
        save_adapter_compared(adapter, model, loaded, probe, kept=kept)
    with replace_folder(final) as temporary:
        saved = save_compared(
            temporary,
            model,
            loaded,
            probe,
            dtype,
            generation,
            texts=lambda saved: {"README.md": card(saved)},
            place=final,
            kept=kept,
        )
    if isinstance(model, PeftModel):
        write_text_atomically(adapter / "README.md", (final / "README.md").read_text(encoding="utf-8"))
    return saved
