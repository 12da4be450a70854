"""A sentence-transformers model: texts as vectors, nearer each other the more they mean the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from cagsr.errors import ModelError
from cagsr.models.files import check_files
from cagsr.support.extras import require


class Encoder(Protocol):
    """The part of sentence-transformers' ``SentenceTransformer`` that is used."""

    def encode(self, sentences: list[str], *, batch_size: int, show_progress_bar: bool) -> Any:
        """Embeddings ``(sentences, width)``."""


def load_encoder(path: str, device: torch.device | str, flag: str = "--embedding_model") -> Encoder:
    """Load a sentence-transformers model, a folder or a Hub id, safetensors weights only; ``flag`` named it, for messages.

    Raises ConfigError if sentence-transformers is not installed, ModelError for a folder or a model that can't be loaded.
    """
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).expanduser().is_dir():
        raise ModelError(f"{flag} {path}: no such folder; give a sentence-transformers folder or a Hub id.")
    require(flag, "embeddings")
    from sentence_transformers import SentenceTransformer

    check_files(path, f"{flag} {path}")
    try:
        return SentenceTransformer(path, device=str(device), model_kwargs={"use_safetensors": True})
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{flag} {path}: can't be loaded as a sentence-transformers model ({reason})") from error
