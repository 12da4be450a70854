"""LLMBar: how often each reward term prefers the answer that people preferred, on open instructions and without training.

    python -m examples.llmbar --model gemma3-270m --output llmbar.json --markdown llmbar.md

LLMBar (Zeng et al., 2024) has a better and a worse answer to each instruction, checked by people. In the adversarial sets the
worse one is made to look better; ``Natural`` has none made up. Every term, the sum of a reward (the default one, or that of
``--config``), length and mean log-probability choose one of the two; chance is 50 %.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from cagsr.commands.score import Config
from cagsr.errors import DataError
from cagsr.evaluation.intervals import Floats, Interval, balanced_interval, mean_interval
from cagsr.models.load import LoadedModel, load_model
from cagsr.parse import parse_command
from cagsr.prompts.prepare import prepare_prompts
from cagsr.prompts.salience import DocumentFrequency
from cagsr.reward.answers import AnswerScorer
from cagsr.reward.weigh import weigh
from cagsr.scoring.answers import encode_response
from cagsr.support.atomic import write_text_atomically
from cagsr.support.progress import shown, working

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "llmbar"
SETS = {
    "natural": ("Natural",),
    "neighbour": ("Adversarial_Neighbor",),
    "GPTInst": ("Adversarial_GPTInst",),
    "GPTOut": ("Adversarial_GPTOut",),
    "manual": ("Adversarial_Manual",),
}
ADVERSARIAL = tuple(name for name in SETS if name != "natural")
PENALTIES = ("repetition", "unsupported")
"""Terms of which less is better."""


@dataclass(frozen=True)
class Options:
    """Measure what terms prefer on LLMBar."""

    model: Path
    """The model whose attention and probabilities are read."""
    data: Path = SHARED
    """Folder with LLMBar's JSON files."""
    config: Path | None = None
    """Settings of ``cagsr score`` or ``train``: the reward whose sum is measured, its attention and salience; None: the default."""
    template: str = "{input}\n\nAnswer:"
    """How an instruction becomes a prompt; the answer follows behind a space."""
    limit: int | None = None
    """Only the first so many pairs of each set."""
    batch_size: int = 16
    """Answers at once."""
    output: Path | None = None
    """JSON file for all numbers."""
    markdown: Path | None = None
    """File for the table."""


@dataclass(frozen=True)
class Pair:
    """An instruction with a better and a worse answer."""

    instruction: str
    better: str
    worse: str
    subset: str


def main(options: Options) -> None:
    """Read, score, and print the table."""
    pairs = read_pairs(options.data, options.limit)
    with shown("llmbar"):
        signals = score(options, pairs)
    subsets = np.array([pair.subset for pair in pairs])
    rows = {name: shares(values, subsets, signals["length"]) for name, values in signals.items()}
    table = as_markdown(rows, subsets)
    print(table)
    if options.markdown is not None:
        write_text_atomically(options.markdown, table + "\n")
    if options.output is not None:
        found = {name: {kind: dataclasses.asdict(one) for kind, one in row.items()} for name, row in rows.items()}
        told = {"options": json.loads(json.dumps(dataclasses.asdict(options), default=str)), "shares": found}
        write_text_atomically(options.output, json.dumps(told, indent=1) + "\n")


def read_pairs(folder: Path, limit: int | None = None) -> list[Pair]:
    """The pairs of all sets. Raises DataError for a file that is not LLMBar's."""
    pairs = []
    for subset, names in SETS.items():
        for name in names:
            file = folder / f"LLMBar_{name}.json"
            try:
                for row in json.loads(file.read_text(encoding="utf-8"))[:limit]:
                    answers = row["output_1"], row["output_2"]
                    better = int(row["label"]) - 1
                    pairs.append(Pair(row["input"], answers[better], answers[1 - better], subset))
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                raise DataError(
                    f"{file}: not a file of LLMBar ({error}); give --data the folder that holds it."
                ) from error
    return pairs


def score(options: Options, pairs: Sequence[Pair]) -> dict[str, Floats]:
    """Every signal of the better and the worse answer, ``(pairs, 2)``, more is better."""
    flags = ["--model", str(options.model), "--data", "-"]
    flags += [] if options.config is None else ["--config", str(options.config)]
    settings: Config = parse_command(Config, flags, prog="llmbar")
    loaded = load_model(settings.model, for_training=False)
    prompts, responses = encode(loaded, settings, options.template, pairs)
    scorer = AnswerScorer(
        loaded,
        settings.reward,
        settings.attention,
        settings.salience,
        micro_batch_size=options.batch_size,
        frequency=DocumentFrequency.fit(one.prompt for one in prompts),
        costly=True,
    )
    raw: dict[str, list[torch.Tensor]] = {name: [] for name in scorer.weights}
    said: list[torch.Tensor] = []
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place].ids) + len(responses[place].ids))
    ordered = [prompts[place] for place in order], [responses[place] for place in order]
    with working("scoring", len(prompts), "answers") as task:
        for batch, values in scorer.score_texts(*ordered):
            for name, value in values.items():
                raw[name].append(value)
            tokens = batch.episodes.sampled
            said.append(((batch.readings.logprobs * tokens).sum(dim=1) / tokens.sum(dim=1)).cpu())
            task.advance(len(tokens))
    back = torch.argsort(torch.tensor(order))
    terms = {name: torch.cat(values)[back] for name, values in raw.items()}
    group = torch.arange(len(pairs)).repeat_interleave(2)
    total = weigh(terms, scorer.weights, settings.reward, group).total

    def table(values: torch.Tensor) -> Floats:
        return values.double().view(-1, 2).numpy()

    found = {
        f"- {name}" if name in PENALTIES else name: table(-values if name in PENALTIES else values)
        for name, values in terms.items()
        if name != "length" and values.isfinite().any() and (scorer.weights[name] or len(values.unique()) > 1)
    }
    lengths = np.array([len(one.ids) for one in responses], dtype=np.float64).reshape(-1, 2)
    found["context_gain a token"] = found["context_gain"] / lengths
    weights = ", ".join(f"{name} {weight:g}" for name, weight in scorer.weights.items() if weight)
    found[f"the sum ({weights})"] = table(total)
    found["mean log-probability"] = table(torch.cat(said)[back])
    found["length"] = lengths
    return found


def encode(loaded: LoadedModel, settings: Config, template: str, pairs: Sequence[Pair]) -> tuple[list, list]:
    """Prompts and answers as tokens, better and worse in turn."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.jsonl"
        rows = [{"prompt": template.replace("{input}", pair.instruction)} for pair in pairs]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data = dataclasses.replace(settings.data, path=str(file))
        room = loaded.room_for_prompts(1)
        encoded = list(prepare_prompts(data, settings.salience, loaded.tokenizer, max_length=room).prompts)
    prompts = [one for one in encoded for _ in range(2)]
    texts = [f" {text.strip()}" for pair in pairs for text in (pair.better, pair.worse)]
    return prompts, [encode_response(loaded, one, text) for one, text in zip(prompts, texts, strict=True)]


def shares(values: Floats, subsets: np.ndarray, length: Floats) -> dict[str, Interval]:
    """Share of the pairs whose better answer has the higher value (ties and NaN count half), with its interval.

    For each set and for all adversarial ones; and with length held fixed (``natural balanced``, ``adversarial balanced``,
    ``balanced``): pairs whose better answer is the longer one count as much as those whose better one is the shorter.
    """
    gap = values[:, 0] - values[:, 1]
    won = np.where(np.isnan(gap), 0.5, (np.sign(gap) + 1) / 2)
    found = {name: mean_interval(won[subsets == name]) for name in SETS if (subsets == name).any()}
    natural = subsets == "natural"
    if not natural.all():
        found["adversarial"] = mean_interval(won[~natural])
    longer = np.sign(length[:, 0] - length[:, 1])
    for name, of in {
        "natural balanced": natural,
        "adversarial balanced": ~natural,
        "balanced": natural | ~natural,
    }.items():
        parts = [won[of & (longer == side)] for side in (1, -1)]
        if all(len(part) for part in parts):
            found[name] = balanced_interval(parts)
    return found


def as_markdown(rows: Mapping[str, Mapping[str, Interval]], subsets: np.ndarray) -> str:
    """The table; what is above or below chance with its whole interval is bold."""
    columns = list(next(iter(rows.values())))
    natural = int((subsets == "natural").sum())
    counts = {name: int((subsets == name).sum()) for name in SETS} | {
        "adversarial": len(subsets) - natural,
        "natural balanced": natural,
        "adversarial balanced": len(subsets) - natural,
        "balanced": len(subsets),
    }
    heads = {
        "adversarial": "all adversarial",
        "natural balanced": "natural, length held fixed",
        "adversarial balanced": "adversarial, length held fixed",
        "balanced": "all, length held fixed",
    }
    header = "| prefers by | " + " | ".join(f"{heads.get(name, name)} ({counts[name]})" for name in columns) + " |"
    lines = [header, "| --- |" + " --- |" * len(columns)]
    for name, row in rows.items():
        cells = []
        for column in columns:
            one = row[column]
            text = f"{one.mean:.2f} [{one.low:.2f}, {one.high:.2f}]"
            cells.append(f"**{text}**" if one.low > 0.5 or one.high < 0.5 else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
