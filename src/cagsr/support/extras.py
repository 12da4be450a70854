"""The packages that only some of the commands need: which extra of ``pip install "cagsr[...]"`` brings which."""

import importlib.util
import sys
from collections.abc import Mapping, Sequence

from cagsr.errors import ConfigError

EXTRAS: Mapping[str, Sequence[str]] = {
    "pages": ("bokeh", "matplotlib", "starlette", "uvicorn"),
    "rate": ("krippendorff", "starlette", "uvicorn"),
    "serve": ("starlette", "uvicorn"),
    "compare": ("matplotlib",),
    "trl": ("trl",),
    "nltk": ("nltk", "rouge_score"),
    "gguf": ("gguf",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "images": ("PIL",),
    "audio": ("soundfile", "soxr", "jiwer"),
    "embeddings": ("sentence_transformers",),
}
"""Extra -> the modules it brings (of ``compare`` those beyond ``trl`` and ``nltk``, which it brings too)."""


def is_installed(module: str) -> bool:
    """Whether a module could be imported; it is not."""
    if module in sys.modules:
        return sys.modules[module] is not None
    return importlib.util.find_spec(module) is not None


def has_extra(name: str) -> bool:
    """Whether all that an extra brings is there."""
    return all(map(is_installed, EXTRAS[name]))


def install_command(*extras: str) -> str:
    """The command that brings extras."""
    return f'pip install "cagsr[{",".join(extras)}]"'


def require(what: str, *extras: str, modules: Sequence[str] = ()) -> None:
    """See that the extras of ``what`` (a command, a setting) are there, before it begins; ``modules``: only those of them.

    Raises ConfigError: one is missing; the sentence says which, and what to install.
    """
    missing = {
        extra: [module for module in EXTRAS[extra] if module in (modules or EXTRAS[extra]) and not is_installed(module)]
        for extra in extras
    }
    wanted = [extra for extra, absent in missing.items() if absent]
    if wanted:
        names = list(dict.fromkeys(name.replace("_", "-") for extra in wanted for name in missing[extra]))
        listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
        verb = "is" if len(names) == 1 else "are"
        raise ConfigError(f"{what} needs {listed}, which {verb} not installed: {install_command(*wanted)}.")
