"""The quickstart's four stages: make a start and a judge with ``sft``, train with CAGSR, compare."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cagsr.config import DataConfig, ModelConfig, SalienceConfig, SamplingConfig, TrainConfig, validate
from cagsr.errors import RunError
from cagsr.flow import EncodedPrompt
from cagsr.models.load import load_model
from cagsr.parse import parse_command, to_yaml
from cagsr.prompts.prepare import prepare_prompts
from cagsr.quickstart import quickstart_report as report
from cagsr.quickstart.before_after import BeforeAfter, compare
from cagsr.quickstart.settings import QuickstartConfig
from cagsr.quickstart.start_model import Recipe, as_jsonl
from cagsr.quickstart.task import make_prompts
from cagsr.support.atomic import disk_errors, write_text_atomically
from cagsr.train import train

SETTINGS = "quickstart.yaml"
"""Marks a folder as a quickstart's."""
RESULTS = ("report.md", "results.json", "answers.jsonl")
MAX_NEW_TOKENS = 64


def run_stages(config: QuickstartConfig, console: Console | None = None) -> BeforeAfter:
    """Run all stages, print what happens, leave everything in ``config.output_dir``, and return what the table shows.

    Raises CagsrError for a size that can't be used, a folder that holds something else, a full disk.
    """
    console = console or Console(highlight=False)
    started = time.monotonic()
    validate(config)
    folder = Path(config.output_dir)
    note = _open(config, folder)
    report.welcome(console, folder)
    if note:
        console.print(note, soft_wrap=True)

    for number, name in enumerate(("start", "judge")):
        report.stage(console, number + 1, pairs=config.pairs)
        recipe = Recipe(folder, name, config.seed, config.seed + number, config.pairs, config.sft_steps)
        if not config.overwrite and recipe.is_made():
            console.print(f"{folder / name}/ is there already, made with these settings: used again.")
            continue
        began = time.monotonic()
        console.print(f"Made {recipe.make()}/ in {time.monotonic() - began:.0f} seconds.")

    report.stage(console, 3, prompts=config.prompts)
    write_text_atomically(folder / "prompts.jsonl", as_jsonl(make_prompts(config.prompts, config.seed)))
    held_out = make_prompts(config.held_out, config.seed, "held_out")
    write_text_atomically(folder / "held_out.jsonl", as_jsonl(held_out))
    train(train_config(config, folder), console=Console(file=console.file, soft_wrap=True, highlight=False))

    report.stage(console, 4, held_out=config.held_out)
    prompts, found = _compare(config, folder)
    _write(config, folder, prompts, found)
    report.print_table(console, found)
    for sentence in report.verdict(found):
        console.print(sentence, style="bold", markup=False, highlight=False)
    report.print_examples(console, prompts, found)
    report.next_steps(console, folder, time.monotonic() - started)
    return found


def train_config(config: QuickstartConfig, folder: Path) -> TrainConfig:
    """Give the settings of stage 3, as ``cagsr train`` takes them: those of ``train.yaml``, with folders, sizes and seed."""
    given = {
        "model.path": folder / "start",
        "data.path": folder / "prompts.jsonl",
        "output_dir": folder / "run",
        "evaluation.path": folder / "held_out.jsonl",
        "evaluation.held_out": min(100, config.held_out),
        "run.steps": config.steps,
        "run.batch_size": config.batch_size,
        "run.seed": config.seed,
        "run.overwrite": (folder / "run").is_dir(),
    }
    flags = [f"--{key}={value}" for key, value in given.items()]
    file = Path(__file__).with_name("train.yaml")
    return parse_command(TrainConfig, ["--config", str(file), *flags], prog="cagsr quickstart")


def _open(config: QuickstartConfig, folder: Path) -> str:
    """Make the folder, or take over an earlier quickstart's; give a note about what was found there."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file: give a folder as --output_dir.")
    with disk_errors(folder):
        earlier = folder.is_dir() and any(folder.iterdir())
        if earlier and not (folder / SETTINGS).is_file():
            raise RunError(
                f"{folder} holds files that are no quickstart: choose an empty or new folder as --output_dir."
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(folder / SETTINGS, to_yaml(config))
        for name in RESULTS:
            (folder / name).unlink(missing_ok=True)
    return f"{folder}/ holds an earlier quickstart: its run and results are replaced." if earlier else ""


def _compare(config: QuickstartConfig, folder: Path) -> tuple[Sequence[EncodedPrompt], BeforeAfter]:
    """Load the three models and compare."""
    start, trained, judge = (
        load_model(ModelConfig(path=str(folder / name), device="cpu"), for_training=False)
        for name in ("start", "run/final", "judge")
    )
    data = DataConfig(path=str(folder / "held_out.jsonl"))
    # Which words matter makes no difference here: nothing is rewarded.
    salience = SalienceConfig(weighting="uniform")
    prompts = prepare_prompts(data, salience, start.tokenizer, max_length=256 - MAX_NEW_TOKENS).prompts
    sampling = SamplingConfig(max_new_tokens=MAX_NEW_TOKENS)
    return prompts, compare(start, trained, judge, prompts, sampling, seed=config.seed)


def _write(config: QuickstartConfig, folder: Path, prompts: Sequence[EncodedPrompt], found: BeforeAfter) -> None:
    """Write the report, the numbers and all answers."""
    write_text_atomically(folder / "report.md", report.as_markdown(prompts, found, config))
    numbers = {
        "columns": {name: answered.temperature for name, answered in found.columns().items()},
        "rows": {measure.key: means for measure, means in report.table_rows(found)},
        "verdict": report.verdict(found),
    }
    write_text_atomically(folder / "results.json", json.dumps(numbers, indent=2) + "\n")
    rows = [
        {
            "prompt": encoded.prompt.text,
            "reference": encoded.prompt.columns["reference"],
            **{name: answered.answers[number] for name, answered in found.columns().items()},
        }
        for number, encoded in enumerate(prompts)
    ]
    write_text_atomically(folder / "answers.jsonl", as_jsonl(rows))
