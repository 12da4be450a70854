"""The command ``cagsr``: pick the subcommand, read its settings, run it, and turn bad input into one sentence.

Each subcommand is a module of this package with a dataclass ``Config`` and a function ``run(config)``; it is imported
when it is asked for, so that help and errors need no torch.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from cagsr import __version__
from cagsr.configfile import suggestion
from cagsr.errors import CagsrError
from cagsr.extras import require
from cagsr.parse import parse_command
from cagsr.progress import shown

BAD_INPUT = 2
INTERRUPTED = 130
BROKEN_PIPE = 141


@dataclass(frozen=True)
class Command:
    """What the help says about a subcommand."""

    summary: str
    """One line for ``cagsr --help``."""
    examples: str
    """Command lines with a comment each, shown under the subcommand's own help."""
    positional: str = ""
    """The setting that a first word without a flag stands for."""
    extras: tuple[str, ...] = ()
    """Extras without which it can't begin (cagsr.extras)."""


COMMANDS = {
    "quickstart": Command(
        "see the whole loop work in minutes, offline: a small model before and after",
        """\
  cagsr quickstart                      # trains, prints a before/after table, draws the curves
  cagsr quickstart --output_dir out     # keep everything in out/""",
        extras=("trl", "nltk", "pages"),
    ),
    "sft": Command(
        "supervised start: teach a model the task from prompt-completion pairs (only if you have some)",
        """\
  cagsr sft --model Qwen/Qwen3-0.6B --data pairs.jsonl --output_dir start
  cagsr sft --model Qwen/Qwen3-0.6B --data pairs.jsonl --output_dir start --lora_r 16
  cagsr sft --model folder_with_config_and_tokenizer --from_scratch --data pairs.jsonl --output_dir start""",
        extras=("trl",),
    ),
    "diagnose": Command(
        "is the reward worth a training run for this model and these prompts? Minutes, not hours",
        """\
  cagsr diagnose --model start --data prompts.jsonl""",
    ),
    "train": Command(
        "improve a model on unlabelled prompts, the reward read from its own attention (PPO)",
        """\
  cagsr train --model start --data prompts.jsonl --output_dir run
  cagsr train --model start --data prompts.jsonl --output_dir run --steps 200 --ppo.estimator rloo
  cagsr train --model Qwen/Qwen3-0.6B --data prompts.jsonl --output_dir run --lora_r 16
  cagsr train --config run/config.yaml --output_dir run2 --reward.self_certainty.weight 1
  cagsr train --config run/config.yaml --resume     # go on after an interruption""",
    ),
    "synthesize": Command(
        "machine-made preference pairs from prompt-completion pairs: right answers against ones with a mistake",
        """\
  cagsr synthesize --data pairs.jsonl --output preferences.jsonl
  cagsr synthesize --data pairs.jsonl --output preferences.jsonl --num_pairs 3000 --corruption.repeat 0""",
    ),
    "reward-model": Command(
        "a reward model from preference pairs, to train with (--reward.models)",
        """\
  cagsr reward-model --model start --data preferences.jsonl --output_dir rm
  cagsr reward-model --model start --data preferences.jsonl --output_dir rm --num_pairs 200
  cagsr train --model start --data prompts.jsonl --output_dir run --reward.models rm""",
        extras=("trl",),
    ),
    "dpo": Command(
        "train on preference pairs directly (DPO): the rival without a reward model",
        """\
  cagsr dpo --model start --data preferences.jsonl --output_dir tuned
  cagsr dpo --model Qwen/Qwen3-0.6B --data preferences.jsonl --output_dir tuned --lora_r 16 --beta 0.1""",
        extras=("trl",),
    ),
    "generate": Command(
        "answer the prompts of a file",
        """\
  cagsr generate --model run/final --data prompts.jsonl --output answers.jsonl""",
    ),
    "score": Command(
        "every reward term for prompt-response pairs, as JSONL",
        """\
  cagsr score --model start --data pairs.jsonl --output scores.jsonl""",
    ),
    "eval": Command(
        "judge a model or its answers by measures the reward can't game, alone or against another model",
        """\
  cagsr eval --model run/final --data test.jsonl --against start
  cagsr eval --model run/final --data test.jsonl --against start --checker my_checks.quality --output eval.json
  cagsr eval --answers answers.jsonl --data test.jsonl --judge_model Qwen/Qwen3-0.6B""",
    ),
    "compare": Command(
        "methods x seeds from one YAML file, resumable, to one report with intervals and plots",
        """\
  cagsr compare examples/e2e/paper.yaml --fast    # a small version first
  cagsr compare examples/e2e/paper.yaml           # goes on where it stopped""",
        positional="plan",
        extras=("compare", "trl", "nltk"),
    ),
    "rank": Command(
        "best of N by the reward, at inference: better answers without training",
        """\
  cagsr rank --model start --data prompts.jsonl --output best.jsonl""",
    ),
    "view": Command(
        "see what answers looked at and what each term gave them: one self-contained HTML page",
        """\
  cagsr view --model start --prompt "tell me about the red cat" --answers 4 --out page.html
  cagsr view --model start --data pairs.jsonl --row 3 --out page.html --png page.png""",
    ),
    "rate": Command(
        "which answers do people prefer? A blind A/B page on this machine, win rate, agreement, preference pairs",
        """\
  cagsr rate serve --a answers_a.jsonl --b answers_b.jsonl --db ratings.sqlite
  cagsr rate serve --db ratings.sqlite              # go on
  cagsr rate summary --db ratings.sqlite
  cagsr rate export --db ratings.sqlite --out pairs.jsonl""",
        positional="mode",
        extras=("rate",),
    ),
    "report": Command(
        "a run's page: curves, warnings, answers over time, costs; one file, or served while it trains",
        """\
  cagsr report run                      # writes run/report.html
  cagsr report run --serve              # refreshes while training goes on
  cagsr report run run2 --out both.html # one over the other""",
        positional="runs",
        extras=("pages",),
    ),
}

INTRODUCTION = """\
CAGSR: reinforcement learning for language models from unlabelled prompts.
The reward is the attention that an answer pays to what matters in its prompt: no labels, no reward model.
"""

ORDER = """\
In which order:
  1. cagsr quickstart                                                  see it work
  2. cagsr sft      --model M --data pairs.jsonl   --output_dir start  a supervised start, if you have pairs
  3. cagsr diagnose --model start --data prompts.jsonl                 will the reward help here?
  4. cagsr train    --model start --data prompts.jsonl --output_dir run
  5. cagsr generate --model run/final --data new.jsonl --output answers.jsonl
     cagsr score, cagsr rank                                           judge answers, or pick the best of N

A prompt file holds one JSON object a line: {"prompt": "..."}; CSV, Parquet and Hub datasets work too.
cagsr COMMAND --help lists a command's settings. Bad input: one sentence and exit status 2.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (without the program's name) and return the exit status.

    0: done; 2: bad input, or a monitor stopped the run; 130: interrupted; 141: the reader of our output went away.
    Exceptions that are no input errors are bugs and keep their traceback.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] in ("-V", "--version", "version"):
        print(f"cagsr {__version__}")
        return 0
    name, *flags = words
    for word in words:
        if any(
            "\ud800" <= character <= "\udfff" for character in word
        ):  # bytes that are no UTF-8, as Python hands them over
            shown = word.encode(errors="replace").decode()
            return _refuse("cagsr", f"the argument '{shown}' is not UTF-8 text; write it (or rename the file) in UTF-8")
    if name not in COMMANDS:
        what = "flag before the command" if name.startswith("-") else "command"
        return _refuse(
            "cagsr", f"unknown {what} '{name}'{suggestion(name, list(COMMANDS)) or '; cagsr --help lists them'}"
        )
    prog = f"cagsr {name}"
    try:
        _run(name, flags)
    except SystemExit as stop:  # --help was printed
        return stop.code if isinstance(stop.code, int) else 0
    except CagsrError as error:
        return _refuse(prog, str(error))
    except KeyboardInterrupt:
        again = "; go on with --resume" if name in ("train", "sft", "reward-model", "dpo") else ""
        _complain(prog, f"interrupted{again}")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (as ``head``) has what it wanted. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        return _refuse(
            prog, f"{error.strerror}: {error.filename or 'while writing'}; free space or choose another folder"
        )
    return 0


def _run(name: str, flags: Sequence[str]) -> None:
    """Import the subcommand's module, read its settings and run it."""
    command = COMMANDS[name]
    _quieten()
    module = importlib.import_module(f"cagsr.commands.{name.replace('-', '_')}")
    summary = command.summary[0].upper() + command.summary[1:] + "."
    epilog = f"\nExamples:\n{command.examples}"
    config = parse_command(
        module.Config, with_positional(name, flags), prog=f"cagsr {name}", description=summary, epilog=epilog
    )
    require(f"cagsr {name}", *command.extras)
    with shown(f"cagsr {name}"):
        # Only now, when the work begins and torch is loaded anyway: transformers' bars for every file it reads and writes.
        importlib.import_module("transformers.utils.logging").disable_progress_bar()
        module.run(config)


def with_positional(name: str, flags: Sequence[str]) -> list[str]:
    """Write a first word without a flag as the setting that it stands for, where a command has one."""
    positional = COMMANDS[name].positional
    return [f"--{positional}", *flags] if positional and flags and not flags[0].startswith("-") else list(flags)


def _overview() -> str:
    """Give the text of ``cagsr --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join([INTRODUCTION, "usage: cagsr COMMAND [settings]", "", *lines, "", ORDER])


def _refuse(prog: str, sentence: str) -> int:
    _complain(prog, f"error: {sentence}")
    return BAD_INPUT


def _complain(prog: str, message: str) -> None:
    """Print to stderr, red on a terminal, in one piece however long it is."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(f"{prog}: {message}", style="red"))


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
