"""Prompt relevance by meaning: the cosine of sentence embeddings, from a model that has no part in the reward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from cagsr.errors import ModelError
from cagsr.models.files import check_files
from cagsr.support.extras import require
from cagsr.support.progress import working

Floats = NDArray[np.float64]


class Encoder(Protocol):
    """The part of sentence-transformers' ``SentenceTransformer`` that is used."""

    def encode(self, sentences: list[str], *, batch_size: int, show_progress_bar: bool) -> Any:
        """Embeddings ``(sentences, width)``."""


@working("embedding the answers")
def embedding_relevance(
    encoder: Encoder, prompts: Sequence[str], answers: Sequence[str], batch_size: int = 64
) -> Floats:
    """Cosine of each prompt's and its answer's embedding, ``(answers,)`` float64, between -1 and 1.

    NaN for an answer without a character that isn't white space. Texts longer than the encoder reads are cut by it. Equal
    texts are embedded once.
    """
    texts = list(dict.fromkeys([*prompts, *answers]))
    vectors = np.asarray(encoder.encode(texts, batch_size=batch_size, show_progress_bar=False), dtype=np.float64)
    place = {text: number for number, text in enumerate(texts)}
    first = vectors[[place[text] for text in prompts]]
    second = vectors[[place[text] for text in answers]]
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    said = np.array([bool(text.strip()) for text in answers]) & (lengths > 0)
    return np.where(said, (first * second).sum(axis=1) / np.where(lengths > 0, lengths, 1.0), np.nan)


def load_encoder(path: str, device: torch.device | str) -> Encoder:
    """Load a sentence-transformers model, safetensors weights only.

    Args:
        path: folder or Hub id.
        device: where it runs.

    Raises:
        ConfigError: sentence-transformers is not installed.
        ModelError: no such folder, or the model can't be loaded.
    """
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).expanduser().is_dir():
        raise ModelError(f"--embedding_model {path}: no such folder; give a sentence-transformers folder or a Hub id.")
    require("--embedding_model", "embeddings")
    from sentence_transformers import SentenceTransformer

    check_files(path, f"--embedding_model {path}")
    try:
        return SentenceTransformer(path, device=str(device), model_kwargs={"use_safetensors": True})
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"--embedding_model {path}: can't be loaded as a sentence-transformers model ({reason})"
        ) from error
