"""The command ``cagsr``: pick the subcommand, read its settings, run it, and turn bad input into one sentence.

Each subcommand is a module of this package with a dataclass ``Config`` and a function ``run(config)``, or names the two in
``commands.yaml``; it is imported when it is asked for, so that help and errors of a command without a reward need no torch (a
reward's terms do).
"""

import errno
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pkgutil import resolve_name
from typing import Any, Literal

import yaml
from rich.console import Console
from rich.text import Text

from cagsr import __version__
from cagsr.errors import CagsrError
from cagsr.parse import parse_command, suggestion
from cagsr.support.extras import require
from cagsr.support.progress import shown

BAD_INPUT = 2
INTERRUPTED = 130
BROKEN_PIPE = 141


@dataclass(frozen=True)
class Command:
    """What ``commands.yaml`` says about a subcommand."""

    summary: str
    examples: str
    positional: str = ""
    extras: tuple[str, ...] = ()
    config: str = ""
    run: str = ""


TEXTS = yaml.safe_load(files("cagsr.commands").joinpath("commands.yaml").read_text(encoding="utf-8"))
COMMANDS = {name: Command(**told) for name, told in TEXTS["commands"].items()}


def part_of(name: str, part: Literal["config", "run"]) -> Any:
    """The settings that a subcommand reads (a dataclass), or the function that runs it with them, imported when asked for."""
    usual = f"cagsr.commands.{name.replace('-', '_')}:{'Config' if part == 'config' else 'run'}"
    return resolve_name(getattr(COMMANDS[name], part) or usual)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (without the program's name) and return the exit status.

    0: done; 2: bad input, or a monitor stopped the run; 130: interrupted; 141: the reader of our output went away.
    Exceptions that are no input errors are bugs and keep their traceback.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
        print(TEXTS["introduction"], "usage: cagsr COMMAND [settings]", "", *lines, "", TEXTS["order"], sep="\n")
        return 0
    if words[0] in ("-V", "--version", "version"):
        print(f"cagsr {__version__}")
        return 0
    name, *flags = words
    for word in words:
        if any("\ud800" <= character <= "\udfff" for character in word):  # no UTF-8, as Python hands it over
            readable = word.encode(errors="replace").decode()
            return _refuse(
                "cagsr", f"the argument '{readable}' is not UTF-8 text; write it (or rename the file) in UTF-8"
            )
    if name not in COMMANDS:
        what = "flag before the command" if name.startswith("-") else "command"
        hint = suggestion(name, list(COMMANDS)) or "; cagsr --help lists them"
        return _refuse("cagsr", f"unknown {what} '{name}'{hint}")
    prog = f"cagsr {name}"
    try:
        _run(name, flags)
    except SystemExit as stop:  # --help was printed
        return stop.code if isinstance(stop.code, int) else 0
    except CagsrError as error:
        return _refuse(prog, str(error))
    except KeyboardInterrupt:
        again = "; go on with --resume" if name in ("train", "sft", "reward-model", "dpo") else ""
        return _refuse(prog, f"interrupted{again}", INTERRUPTED)
    except BrokenPipeError:
        # The reader (as ``head``) has what it wanted. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        where = error.filename or "while writing"
        return _refuse(prog, f"{error.strerror}: {where}; free space or choose another folder")
    return 0


def _run(name: str, flags: Sequence[str]) -> None:
    """Import the subcommand's module, read its settings and run it."""
    command = COMMANDS[name]
    _quieten()
    config = parse_command(
        part_of(name, "config"),
        with_positional(name, flags),
        prog=f"cagsr {name}",
        description=command.summary[0].upper() + command.summary[1:] + ".",
        epilog=f"\nExamples:\n{command.examples}",
    )
    require(f"cagsr {name}", *command.extras)
    with shown(f"cagsr {name}"):
        # Only now, when the work begins and torch is loaded anyway: transformers' bars for every file it reads and writes.
        importlib.import_module("transformers.utils.logging").disable_progress_bar()
        part_of(name, "run")(config)


def with_positional(name: str, flags: Sequence[str]) -> list[str]:
    """Write a first word without a flag as the setting that it stands for, where a command has one."""
    positional = COMMANDS[name].positional
    return [f"--{positional}", *flags] if positional and flags and not flags[0].startswith("-") else list(flags)


def _refuse(prog: str, sentence: str, status: int = BAD_INPUT) -> int:
    """Print to stderr, red on a terminal, in one piece however long it is; returns the exit status."""
    error = "error: " if status == BAD_INPUT else ""
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(f"{prog}: {error}{sentence}", style="red"))
    return status


def _quieten() -> None:
    """Keep libraries' advice and bars out of our output; their errors stay, and so does what the user has set."""
    for variable, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }.items():
        os.environ.setdefault(variable, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(transformers|trl|peft|accelerate|torch)\b")
    for name in ("accelerate", "trl", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
