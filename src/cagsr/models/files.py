"""What a model's folder holds, before any library opens it: whole files, an adapter, and a fingerprint of it all."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

from cagsr.errors import ModelError
from cagsr.models.gguf import SUFFIX, check_gguf, find_source

POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that Git LFS left in place of the real one."""
TEXTS = (
    "config.json", "generation_config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "model.safetensors.index.json",
)  # fmt: skip
"""Files beside the weights that make a model and its tokenizer."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ADAPTER = "adapter_config.json"
SENTENCEPIECE = "tokenizer.model"
"""What llama.cpp reads the vocabulary of SentencePiece models (Llama 2, Mistral, Gemma) from, where it is there; transformers
writes ``tokenizer.json`` alone."""
BLOCK = 4096
"""Bytes read at the start, in the middle and at the end of each tensor for its fingerprint."""


def copy_beside(path: str, names: Sequence[str], folder: Path) -> None:
    """Put files of a model, a folder or a Hub id, into a folder, those that are at hand; what is there already stays."""
    for name in names:
        source: Any = Path(path) / name
        if not source.is_file():
            with suppress(HFValidationError):  # it is no id
                source = try_to_load_from_cache(path, name)
        if isinstance(source, str | Path) and Path(source).is_file() and not (folder / name).exists():
            shutil.copyfile(source, folder / name)


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is a Git LFS pointer: a few lines that stand for the real one."""
    with open(path, "rb") as stream:
        return stream.read(len(POINTER)) == POINTER


def check_files(path: str, what: str, *, weights: bool = True) -> None:
    """Refuse a local folder or GGUF file that is not there or whose files are no whole files. Of a Hub id nothing is known here.

    ``what`` opens the message: the flag and the path. ModelError: no folder, a Git LFS pointer in place of a file, ``weights``
    that were cut short, or a part of them missing. ConfigError: no package that reads GGUF files.
    """
    folder = Path(path)
    if (gguf := find_source(path, what).gguf) is not None:
        _check_no_pointer(gguf, what)
        return check_gguf(gguf, what)
    if not folder.is_dir():
        if path.lower().endswith(SUFFIX):
            raise ModelError(f"{what}: no such file.")
        if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise ModelError(f"{what}: no such folder; give a folder in Hugging Face layout or a Hub id.")
        return
    for file in (*(folder / name for name in TEXTS), *(weight_files(folder) if weights else ())):
        if not file.is_file():
            if file.suffix == ".safetensors":
                raise ModelError(f"{what}: {file.name} is missing, a part of the weights; copy the whole folder.")
            continue
        _check_no_pointer(file, what)
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="np"):  # checks the header against the file's size
                    pass
            except SafetensorError as error:
                raise ModelError(
                    f"{what}: {file.name} is damaged or was cut short ({_first_line(error).rstrip('.')}); copy or download it "
                    "again."
                ) from error


def _check_no_pointer(file: Path, what: str) -> None:
    if is_lfs_pointer(file):
        raise ModelError(
            f"{what}: {file.name} is a Git LFS pointer, not the file itself; run 'git lfs pull' in that folder, or "
            "download the file."
        )


def check_safetensors(path: str, what: str) -> None:
    """Refuse a local folder without safetensors (ModelError): a pickle can run any code when it is opened."""
    folder = Path(path)
    if find_source(path, what).gguf is not None:
        raise ModelError(f"{what}: a GGUF file is read as a language model only; give a folder with safetensors.")
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    if pickles := sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES):
        raise ModelError(
            f"{what}: only pickled weights ({', '.join(pickles[:3])}), which can run code when opened and are "
            "never loaded; convert them to safetensors first (model.save_pretrained in a place you trust)."
        )
    raise ModelError(f"{what}: the folder has no *.safetensors weights.")


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Inside the block what transformers raises is a ModelError: the sentence ``what`` with the reason behind it."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise ModelError(f"{what} ({_first_line(error)})") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a folder's weights are read from, whether they are there or not."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        # A pointer or a broken index names no files: whoever opens it says so.
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / name for name in sorted(set(parts))]
    return sorted(folder.glob("*.safetensors"))


def weights_problem(info: Mapping[str, Any]) -> str | None:
    """What is wrong with weights that transformers has loaded (``output_loading_info``); None where nothing is.

    Weights that the file lacks, or has in another size, are random numbers in the loaded model.
    """
    if mismatched := sorted(info["mismatched_keys"]):
        name, *sizes = mismatched[0]
        stored, wanted = (" x ".join(map(str, size)) or "a number" for size in sizes)
        return (
            f"its weights have other sizes than its config.json says ({name}: {stored} in the file, {wanted} by the "
            f"config{_and_more(mismatched)}); put the right config.json and weights together"
        )
    if missing := sorted(info["missing_keys"]):
        return (
            f"it has no weights for {missing[0]!r}{_and_more(missing)}, which would be random; give the folder of a whole "
            "model whose config.json fits its weights"
        )
    return None


def is_adapter(path: str) -> bool:
    """Whether a local folder holds a PEFT adapter and no model of its own."""
    return (Path(path) / ADAPTER).is_file() and not (Path(path) / "config.json").is_file()


def adapter_base(path: str) -> str:
    """The folder or Hub id of the base that the adapter in a folder names; ModelError where it names none."""
    try:
        base = json.loads((Path(path) / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"--model.path {path}: its {ADAPTER} can't be read as JSON; copy it again.") from error
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"--model.path {path}: is a PEFT adapter that names no base model; write the base's folder or Hub id as "
            f"base_model_name_or_path into its {ADAPTER}, or give a merged model."
        )
    return base


def fingerprint_model(path: str) -> str | None:
    """A hash of a model's config, tokenizer and weights; None where nothing is known of it.

    Small files are read whole. Of each tensor its name, type and shape count, and ``BLOCK`` bytes at its start, in its
    middle and at its end: a training or a merge changes every number of the matrices it touches, and reading all of a large
    model would take minutes. An adapter counts together with its base, a Hub id by the commit that is cached here, a GGUF file
    whole.
    """
    folder = Path(path)
    if (gguf := find_source(path, f"--model.path {path}").gguf) is not None:
        with open(gguf, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    if not folder.is_dir():
        cached = try_to_load_from_cache(path, "config.json")
        return Path(cached).parent.name if isinstance(cached, str) else None
    digest = hashlib.sha256()
    for file in (*(folder / name for name in TEXTS), *sorted(folder.glob("*.py"))):
        if file.is_file():
            digest.update(f"{file.name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    for file in weight_files(folder):
        if file.is_file():
            digest.update(f"{file.name}\0".encode())
            for block in _sampled(file):
                digest.update(block)
    if is_adapter(path):
        base = adapter_base(path)
        digest.update((fingerprint_model(base) or base).encode())
    return digest.hexdigest()


def _sampled(file: Path) -> Iterator[bytes]:
    """The header of a safetensors file and a few blocks of each tensor."""
    with open(file, "rb") as stream:
        start = stream.read(8)
        header = stream.read(int.from_bytes(start, "little"))
        yield header
        first = len(start) + len(header)
        tensors = {name: value for name, value in json.loads(header).items() if name != "__metadata__"}
        for _, value in sorted(tensors.items()):
            begin, end = value["data_offsets"]
            for offset in sorted({begin, max(begin, (begin + end - BLOCK) // 2), max(begin, end - BLOCK)}):
                stream.seek(first + offset)
                yield stream.read(min(BLOCK, end - offset))


def _and_more(names: Sequence[Any]) -> str:
    return f" and {len(names) - 1:,} more" if len(names) > 1 else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
