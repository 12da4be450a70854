"""``cagsr eval``: judge a model, or finished answers, by measures that share nothing with the reward."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cagsr.commands.inputs import OptionalDataConfig, read_prompts, table_console
from cagsr.config import ModelConfig, SamplingConfig
from cagsr.config.ranges import NonNegativeFloat, NonNegativeInt, OutputFile, PositiveInt, PositiveShare, Seed
from cagsr.errors import DataError, ModelError
from cagsr.support.extras import install_command
from cagsr.support.progress import say, working

if TYPE_CHECKING:
    import torch

    from cagsr.evaluation.evaluation_report import EvalReport
    from cagsr.evaluation.judge_answers import AnswerJudge
    from cagsr.evaluation.judged_policies import Evaluated, PolicyComparison
    from cagsr.flow import EncodedPrompt
    from cagsr.models.load import LoadedModel


@dataclass(frozen=True)
class OptionalModelConfig(ModelConfig):
    """The model to judge, unless --answers gives its answers."""

    path: str = ""
    """Folder or Hub id of a transformers model with safetensors weights and a tokenizer."""


@dataclass(frozen=True)
class EvalSampling:
    """How answers are sampled; --temperatures and --samples say the rest."""

    max_new_tokens: PositiveInt = 128
    """Longest answer in tokens."""
    min_new_tokens: NonNegativeInt = 0
    """Shortest answer in tokens (the stop token is forbidden before)."""
    top_p: PositiveShare = 1.0
    """Nucleus sampling."""
    top_k: NonNegativeInt = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    stop_strings: list[str] = field(default_factory=list)
    """Texts that end an answer, besides the model's stop token."""


@dataclass(frozen=True)
class Config:
    """Answer test prompts and judge the answers, alone or against another model's."""

    model: OptionalModelConfig = field(default_factory=OptionalModelConfig)
    data: OptionalDataConfig = field(default_factory=OptionalDataConfig)
    answers: str | None = None
    """File of finished answers, as cagsr generate writes it, instead of --model; --data then adds its rows' columns."""
    against: str | None = None
    """Model to compare with, usually the start: at the same temperatures, and at matched entropy."""
    against_answers: str | None = None
    """File of another model's answers to the same prompts, to compare --answers with."""
    temperatures: list[NonNegativeFloat] = field(default_factory=lambda: [1.0, 0.0])
    """Temperatures to sample at; 0 is greedy."""
    samples: PositiveInt = 1
    """Answers to each prompt (greedy: one); 2 or more give self-BLEU."""
    sampling: EvalSampling = field(default_factory=EvalSampling)
    checker: str | None = None
    """Dotted path of f(prompts, completions, **columns) -> a number for each answer, or a dict of named numbers."""
    judge_model: str | None = None
    """Decoder-only model for follow-up perplexity; choose one that neither side was trained from."""
    embedding_model: str | None = None
    """sentence-transformers model for relevance by meaning (pip install cagsr[embeddings])."""
    reward_model: str | None = None
    """Reward model for win rates; choose one that neither side was trained with."""
    follow_up_column: str | None = None
    """Column of the true follow-up; None: follow_up, else the first reference."""
    output: OutputFile | None = None
    """JSON file for every mean, interval and prompt's value."""
    markdown: OutputFile | None = None
    """Also write the tables as Markdown to this file."""
    batch_size: PositiveInt = 64
    """Answers at once."""
    seed: Seed = 0
    """Seeds the sampling, alike for both models."""

    def conflicts(self) -> Iterator[str]:
        """Yield what does not go together, a sentence each."""
        if (self.answers is None) == (self.model.path == ""):
            both = "" if self.answers is None else ", not both"
            yield f"Give either --model MODEL (with --data FILE) or --answers FILE{both}."
        if self.answers is not None and self.against is not None:
            yield "--against samples a model; compare --answers with another file: --against_answers FILE."
        if self.answers is None and self.against_answers is not None:
            yield "--against_answers goes with --answers; compare --model with another model: --against MODEL."
        if self.answers is None and not self.data.path:
            yield "--data FILE is missing: the prompts that --model is to answer."
        if not self.temperatures or len(set(self.temperatures)) < len(self.temperatures):
            yield "--temperatures must name at least one temperature, each once."
        yield from _sampling(self, 1.0).conflicts()


def run(config: Config) -> None:
    """Sample or read, judge, compare; print the tables and write what was asked for."""
    from cagsr.evaluation.evaluation_report import as_markdown, as_tree, print_report
    from cagsr.support.atomic import write_text_atomically

    report = _from_answers(config) if config.answers is not None else _from_model(config)
    if report.left_out:
        say(f"Left out: {'; '.join(report.left_out)}.")
    print_report(report, table_console())
    judged = sum(len(own) for one in (*report.mine, *report.theirs) for own in one.answers)
    say(f"Judged: {judged:,} answers to {len(report.prompts):,} prompts.")
    if config.output is not None:
        text = json.dumps(as_tree(report), ensure_ascii=False, allow_nan=False, indent=1)
        write_text_atomically(Path(config.output), text + "\n")
        say(f"All numbers: {config.output}")
    if config.markdown is not None:
        write_text_atomically(Path(config.markdown), as_markdown(report))
        say(f"The tables: {config.markdown}")


def _sampling(config: Config, temperature: float) -> SamplingConfig:
    generations = config.samples if temperature > 0 else 1
    return SamplingConfig(num_generations=generations, temperature=temperature, **dataclasses.asdict(config.sampling))


def _judge(config: Config, device: torch.device) -> AnswerJudge:
    from cagsr.evaluation.judge_answers import AnswerJudge
    from cagsr.evaluation.judges import Judges

    judges = (config.checker, config.judge_model, config.embedding_model, config.reward_model, config.follow_up_column)
    return AnswerJudge(Judges(*judges), device)


def _from_answers(config: Config) -> EvalReport:
    """Judge one or two files of answers."""
    import torch

    from cagsr.evaluation.given_answers import in_order_of, read_answers
    from cagsr.evaluation.judged_policies import compare, evaluate_answers

    data = config.data if config.data.path else None
    columns = [config.follow_up_column] if config.follow_up_column is not None else []
    given = read_answers(str(config.answers), data, columns)
    other = None
    if config.against_answers is not None:
        other = in_order_of(read_answers(config.against_answers, data, columns), given.prompts, config.against_answers)
    name = config.model.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    judge = _judge(config, torch.device(name))
    mine = evaluate_answers("as given", None, given.prompts, given.answers, judge, given.measures)
    theirs = []
    if other is not None:
        theirs = [evaluate_answers("as given", None, given.prompts, other.answers, judge, other.measures)]
    comparisons = [compare("As given", mine, one) for one in theirs]
    lacking = ["entropy, and the comparison at matched entropy (answers from a file)"]
    return _report(config, given.prompts, [mine], theirs, comparisons, judge, lacking)


def _from_model(config: Config) -> EvalReport:
    """Sample from one or two models, one after the other, and judge."""
    from cagsr.evaluation.judged_policies import compare
    from cagsr.evaluation.matched_entropy import matching_temperature
    from cagsr.models.generation import generation_notes
    from cagsr.models.load import load_model

    asked: list[EncodedPrompt] = []
    vocabulary: dict[str, int] = {}
    if config.against is not None:
        # Loaded once beforehand, so that what is wrong with it is said before anything is sampled. One model in memory
        # at a time.
        other = _load_other(config)
        asked, vocabulary = _prompts(config, other)[0], other.tokenizer.get_vocab()
        del other
    loaded = load_model(config.model, for_training=False)
    prompts, notes = _prompts(config, loaded)
    if asked and [one.prompt.row for one in asked] != [one.prompt.row for one in prompts]:
        raise DataError(
            f"{config.data.path}: the two models' contexts hold different prompts ({len(prompts):,} and {len(asked):,}); "
            "set --data.max_prompt_length so that both read the same."
        )
    judge = _judge(config, loaded.device)
    judge.left_out(prompts)  # refuses what would fail only after sampling
    told = generation_notes(loaded, _sampling(config, config.temperatures[0]))
    say(*loaded.notes, *told, *notes)
    mine = {at: _evaluate(config, loaded, prompts, at, judge) for at in config.temperatures}
    theirs: dict[str, Evaluated] = {}
    comparisons: list[PolicyComparison] = []
    lacking: list[str] = []
    if config.against is not None:
        comparable = loaded.tokenizer.get_vocab() == vocabulary
        del loaded
        other = _load_other(config)
        for at, found in mine.items():
            same = _evaluate(config, other, asked, at, judge)
            theirs[same.name] = same
            comparisons.append(compare(f"{found.name.capitalize()}, both", found, same))
        sampled = [found for at, found in mine.items() if at > 0]
        if sampled and not comparable:
            lacking.append("matched entropy (the two models count in different tokens)")
        for found in sampled if comparable else ():
            sampling, size = _sampling(config, 1.0), config.batch_size
            target, *others = (float(one.values["entropy"].mean()) for one in (found, *theirs.values()))
            entropies = zip((one.temperature for one in theirs.values()), others, strict=True)
            known = {at: entropy for at, entropy in entropies if at}
            try:
                at = matching_temperature(other, asked, sampling, target, config.seed, size, known=known)
                matched = _evaluate(config, other, asked, at, judge, f"entropy of {found.name} (T = {at:.3f})")
            except ModelError as error:
                lacking.append(f"matched entropy for {found.name} ({str(error).rstrip('.')})")
                continue
            theirs[matched.name] = matched
            against = f"against the other at matched entropy (temperature {matched.temperature:.3f})"
            comparisons.append(compare(f"{found.name.capitalize()}, {against}", found, matched))
    return _report(config, prompts, [*mine.values()], [*theirs.values()], comparisons, judge, lacking)


def _prompts(config: Config, loaded: LoadedModel) -> tuple[list[EncodedPrompt], tuple[str, ...]]:
    columns = [config.follow_up_column] if config.follow_up_column is not None else []
    return read_prompts(config.data, None, None, None, loaded, config.sampling.max_new_tokens, columns)


def _load_other(config: Config) -> LoadedModel:
    from cagsr.models.load import load_model

    try:
        return load_model(dataclasses.replace(config.model, path=str(config.against)), for_training=False)
    except ModelError as error:
        raise ModelError(str(error).replace("--model.path", "--against")) from error


def _evaluate(
    config: Config,
    loaded: LoadedModel,
    prompts: Sequence[EncodedPrompt],
    temperature: float,
    judge: AnswerJudge,
    name: str | None = None,
) -> Evaluated:
    from cagsr.evaluation.judged_policies import evaluate_answers
    from cagsr.evaluation.matched_entropy import answers_at

    name = name or (f"temperature {temperature:g}" if temperature > 0 else "greedy")
    sampling = _sampling(config, temperature)
    with working(name):
        found = answers_at(loaded, prompts, sampling, config.seed, config.batch_size)
    many = sampling.num_generations
    answers = [found.texts[start : start + many] for start in range(0, len(found.texts), many)]
    more = {"tokens": found.tokens, "ended": found.ended, "entropy": found.entropy}
    return evaluate_answers(name, temperature, prompts, answers, judge, more)


def _report(
    config: Config,
    prompts: Sequence[EncodedPrompt],
    mine: list[Evaluated],
    theirs: list[Evaluated],
    comparisons: list[PolicyComparison],
    judge: AnswerJudge,
    lacking: list[str],
) -> EvalReport:
    from cagsr.evaluation.evaluation_report import EvalReport
    from cagsr.evaluation.judged_policies import corrected

    left_out = judge.left_out(prompts)
    if config.reward_model is None or not comparisons:
        no = "--reward_model" if config.reward_model is None else "other side to win against"
        left_out.append(f"win rate (no {no})")
    if "self_bleu" not in mine[0].values:
        one = min(map(len, mine[0].answers)) == 1
        why = "one answer to each prompt; --samples 2 or more" if one else install_command("nltk")
        left_out.append(f"self-BLEU ({why})")
    return EvalReport(
        model=str(config.answers or config.model.path),
        against=config.against or config.against_answers,
        prompts=prompts,
        mine=mine,
        theirs=theirs,
        comparisons=corrected(comparisons),
        left_out=[*left_out, *lacking],
        settings=dataclasses.asdict(config),
    )
