"""Models in GGUF files (llama.cpp's format): found, told to transformers, and made plain models once they are loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cagsr.errors import ModelError
from cagsr.support.extras import require

if TYPE_CHECKING:  # readers of data look for LFS pointers beside this module: they need no torch
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SUFFIX = ".gguf"
MAGIC = b"GGUF"
"""How every such file begins."""
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""torch's names of the precisions of matrices that are no blocks, by those in GGUF."""


@dataclass(frozen=True)
class Source:
    """Where ``from_pretrained`` reads a model: a folder or a Hub id, or a GGUF file."""

    path: str
    gguf: Path | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What ``from_pretrained`` must be told beside the path, of configs, tokenizers and models alike.

        The file's whole path: a mere name transformers looks up in the working directory first.
        """
        return {} if self.gguf is None else {"gguf_file": str(self.gguf.absolute())}

    @property
    def weight_options(self) -> dict[str, Any]:
        """``options``, and for models alone: every weight is dequantised. Kernels for packed weights can't train them."""
        if self.gguf is None:
            return {}
        from transformers import GgufConfig

        return self.options | {"quantization_config": GgufConfig(dequantize=True)}


def find_source(path: str, what: str) -> Source:
    """A GGUF file, or a folder's only one where it has no safetensors; anything else is left as it is.

    ``what`` opens the message: the flag and the path. ModelError: a folder with several, a file in several parts.
    """
    place = Path(path)
    if place.suffix.lower() == SUFFIX and place.is_file():
        return Source(str(place.parent), place)
    if not place.is_dir() or any(place.glob("*.safetensors*")):
        return Source(path)
    files = sorted(file for file in place.iterdir() if file.suffix.lower() == SUFFIX)
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ModelError(f"{what}: the folder has several GGUF files ({names}); name one, as {files[0]}.")
    return Source(path, files[0]) if files else Source(path)


def check_gguf(file: Path, what: str) -> None:
    """Refuse what can't be read: ConfigError without the package, ModelError for a file that is no GGUF."""
    with open(file, "rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            raise ModelError(f"{what}: {file.name} is no GGUF file, or was cut short; copy or download it again.")
    if "-of-" in file.stem:
        raise ModelError(
            f"{what}: {file.name} is one part of a model, which transformers can't read; join the parts into one file "
            "(llama-gguf-split --merge)."
        )
    require(f"{what}: a GGUF file", "gguf")


@dataclass(frozen=True)
class Quantisation:
    """How a GGUF file holds its weights."""

    name: str
    """As llama.cpp calls it: Q4_K_M."""
    dtype: torch.dtype
    """The precision that loses nothing: the file's own where it holds floats; float32 where it holds blocks."""


def read_quantisation(file: Path) -> Quantisation:
    """What a file says of how its matrices are stored."""
    import torch
    from gguf import LlamaFileType
    from transformers.integrations.gguf.reader import read_gguf_metadata  # gguf's own takes seconds for the vocabulary

    metadata, _ = read_gguf_metadata(str(file))
    # A file may say nothing of itself, or something that no version of the package knows.
    known = {int(kind): kind.name.partition("_")[2] for kind in LlamaFileType}
    name = known.get(metadata.get("general.file_type", -1), "quantisation unknown")
    return Quantisation(name, getattr(torch, _FLOATS.get(name, "float32")))


def make_plain(model: PreTrainedModel, file: Path) -> None:
    """Have a model that was loaded from a GGUF file forget that, in place: ``save_pretrained`` refuses one that remembers.

    Its name is the file's, whose folder may have others.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    model.name_or_path = model.config.name_or_path = str(file)


def drop_foreign_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Take away, in place, tokens that the file does not have (it has ``size``): the model has no rows for them.

    transformers makes a byte-level tokenizer as GPT-2's, which brings its <|endoftext|>.
    """
    from tokenizers import Tokenizer

    if len(tokenizer) > size:
        core = json.loads(tokenizer.backend_tokenizer.to_str())
        core["added_tokens"] = [token for token in core["added_tokens"] if token["id"] < size]
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(core))
