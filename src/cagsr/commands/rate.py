"""``cagsr rate``: which of two answers do people prefer? A blind page, a summary, an export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cagsr.config.ranges import OutputFile, Port, PositiveInt, Seed
from cagsr.config.validation import checked
from cagsr.errors import ConfigError, DataError
from cagsr.support.progress import say

if TYPE_CHECKING:
    from cagsr.rating.rating_questions import RatingQuestions
    from cagsr.rating.store import Judgement, Store


@dataclass(frozen=True)
class Config:
    """Let people compare two sides' answers blindly (serve), sum up what they said (summary), make pairs of it (export)."""

    mode: Literal["serve", "summary", "export"]
    """What to do (given without a flag: cagsr rate serve)."""
    db: str = "ratings.sqlite"
    """The ratings file (SQLite). serve makes it, or goes on with it: then no other file is needed."""
    a: str | None = None
    """serve: answers of one side, as cagsr generate writes them."""
    b: str | None = None
    """serve: answers of the other side to the same prompts."""
    pairs: str | None = None
    """serve: one file with both answers in each row, instead of --a and --b."""
    ranked: str | None = None
    """serve: a file of cagsr rank instead: people are asked about the pairs of candidates on which the reward's terms disagree
    most, one of each prompt (for cagsr calibrate)."""
    questions: PositiveInt = 50
    """serve: how many of them, with --ranked."""
    gold: str | None = None
    """serve: pairs whose better answer is known (columns prompt, chosen, rejected), mixed in to check the raters."""
    prompt_column: str = "prompt"
    """Column with the prompt: text or chat messages."""
    response_column: str = "completion"
    """Column with the answer in --a and --b."""
    a_column: str = "a"
    """Column of --pairs with the answer of side A."""
    b_column: str = "b"
    """Column of --pairs with the answer of side B."""
    scales: bool = False
    """serve: also ask for relevance, fluency and helpfulness from 1 to 5, for both answers."""
    seed: Seed | None = None
    """serve: draws the order of the questions and which answer stands on the left; None: 0, or what the ratings file has."""
    port: Port = 8642
    """serve: port on 127.0.0.1; 0 takes a free one."""
    out: OutputFile | None = None
    """export: JSONL file for the pairs (None: standard output). summary: JSON file for the numbers."""
    votes: Literal["majority", "each"] = "majority"
    """export: one pair for each question that most of its raters agree on, or one for each rating."""
    leave_out: list[str] = field(default_factory=list)
    """summary, export: raters whose ratings do not count."""

    def conflicts(self) -> Iterator[str]:
        """Yield what does not go together, a sentence each."""
        default = Config(self.mode)
        for mode, names in ONLY.items():
            for name in names if mode != self.mode else ():
                if getattr(self, name) != getattr(default, name):
                    yield f"--{name} belongs to cagsr rate {mode}; leave it out of {self.mode}."
        if self.mode == "serve" and (self.out is not None or self.leave_out):
            yield "--out and --leave_out belong to cagsr rate summary and export; leave them out of serve."
        if sum(given is not None for given in (self.a or self.b, self.pairs, self.ranked)) > 1:
            yield "Give one of these: --a and --b, --pairs, or --ranked."
        if self.ranked is None and self.questions != default.questions:
            yield "--questions: how many are asked of --ranked; without it all are."
        if (self.a is None) != (self.b is None):
            yield f"--{'b' if self.b is None else 'a'} is missing: two files of answers are compared."


COLUMNS = ("prompt_column", "response_column", "a_column", "b_column")
ONLY = {
    "serve": ("a", "b", "pairs", "ranked", "questions", "gold", *COLUMNS, "scales", "seed", "port"),
    "export": ("votes",),
}
"""Settings that one mode alone reads."""


def run(config: Config) -> None:
    """Serve the page, print the summary, or write the pairs."""
    {"serve": _serve, "summary": _summary, "export": _export}[config.mode](config)


def _serve(config: Config) -> None:
    from cagsr.rating.server import link, rating_app
    from cagsr.support.localhost import listen, serve_until_interrupted

    path = Path(config.db)
    with closing(listen(config.port)) as taken, closing(_store(config, path)) as store:
        lines = [
            f"Open {link(store, taken)}",
            f"Ratings go to {path}. Ctrl-C stops; the same command with --db alone goes on.",
        ]
        application = rating_app(store, taken.getsockname()[1])
        with suppress(KeyboardInterrupt):
            serve_until_interrupted(application, taken, lambda: say(*lines))
        count = len(store.judgements())
    say(f"Stopped. {count:,} ratings in {path}; cagsr rate summary --db {path} sums them up.")


def _store(config: Config, path: Path) -> Store:
    """Open the ratings file and check that it is about these files and settings, or make it."""
    from cagsr.rating.store import SCALES, Settings, Store, was_created

    checked(OutputFile, str(path), "--db")
    known = was_created(path)
    asked = _questions(config, known)
    if not known:
        assert asked is not None
        if not any(not one.gold for one in asked.questions):
            raise DataError("There is nothing to rate: all pairs have two equal answers.")
        say(*asked.notes())
        a, b = str(config.a), str(config.b)
        if config.pairs is not None:
            a, b = (f"{config.pairs}, column {column}" for column in (config.a_column, config.b_column))
        if config.ranked is not None:
            a, b = f"{config.ranked}, the better by the reward", f"{config.ranked}, the worse"
        settings = Settings(a, b, SCALES if config.scales else (), config.seed or 0)
        gold = sum(one.gold for one in asked.questions)
        say(f"{len(asked.questions) - gold:,} questions" + (f" and {gold:,} gold questions." if gold else "."))
        return Store.create(path, asked.questions, settings)
    store = Store(path)
    try:
        if asked is not None:
            old, new = {one.id for one in store.questions()}, {one.id for one in asked.questions}
            if old != new:
                raise DataError(
                    f"{path} is about other questions than these files ({len(new - old):,} are new, {len(old - new):,} are "
                    "missing); give --db alone to go on with it, or another --db."
                )
        if config.seed not in (None, store.settings.seed):
            raise ConfigError(f"--seed {config.seed}: {path} was begun with seed {store.settings.seed}; leave it out.")
        if config.scales and not store.settings.scales:
            raise ConfigError(f"--scales: {path} was begun without scales; leave it out, or give another --db.")
    except (ConfigError, DataError):
        store.close()
        raise
    return store


def _questions(config: Config, known: bool) -> RatingQuestions | None:
    """Read the questions of the files given; None where none are and the ratings file has its own."""
    sides = [name for name in (config.a, config.b) if name is not None]
    if config.pairs is None and config.ranked is None and not sides:
        if not known:
            raise ConfigError(
                f"{config.db} does not exist yet: give --a and --b (files of answers), --pairs, or --ranked."
            )
        if config.gold is not None:
            raise ConfigError("--gold: give it together with the files that the ratings file was begun with.")
        return None

    for flag in ("a", "b", "pairs", "ranked", "gold"):
        name = getattr(config, flag)
        if name is not None and not Path(name).is_file():
            raise DataError(f"--{flag} {name}: no such file; check the path.")

    from cagsr.rating.rating_questions import questions_from_answers, questions_from_pairs, with_gold

    column = config.prompt_column
    if config.ranked is not None:
        from cagsr.rating.disagreement import questions_by_disagreement

        found = questions_by_disagreement(config.ranked, config.questions)
    elif config.pairs is not None:
        found = questions_from_pairs(config.pairs, config.a_column, config.b_column, prompt_column=column)
    else:
        found = questions_from_answers(*sides, prompt_column=column, response_column=config.response_column)
    if config.gold is None:
        return found
    return with_gold(found, questions_from_pairs(config.gold, "chosen", "rejected", prompt_column=column, gold=True))


def _summary(config: Config) -> None:
    import json

    from cagsr.rating.store import Store
    from cagsr.rating.summary import summarize
    from cagsr.support.atomic import write_text_atomically

    with closing(Store(Path(config.db))) as store:
        questions = sum(not one.gold for one in store.questions())
        found = summarize(_that_count(config, store), questions, store.settings)
    print(found.text())
    if config.out is not None:
        write_text_atomically(Path(config.out), json.dumps(asdict(found), indent=2, ensure_ascii=False) + "\n")


def _export(config: Config) -> None:
    from cagsr.commands.inputs import write_rows
    from cagsr.rating.export import preference_pairs
    from cagsr.rating.store import Store

    with closing(Store(Path(config.db))) as store:
        found = preference_pairs(_that_count(config, store), config.votes)
    if not found.rows:
        raise DataError(
            f"{config.db}: no rating prefers an answer, so there is nothing to write ({found.sentence()[:-1]})."
        )
    write_rows(found.rows, config.out)
    say(f"{config.out or 'Standard output'}: {found.sentence()}")


def _that_count(config: Config, store: Store) -> list[Judgement]:
    """All ratings but those of the raters who are left out."""
    judgements = store.judgements()
    known = dict.fromkeys(one.rater for one in judgements)
    for name in config.leave_out:
        if name not in known:
            raise ConfigError(
                f"--leave_out {name}: no such rater in {config.db} (there are: {', '.join(known) or 'none'})."
            )
    return [one for one in judgements if one.rater not in config.leave_out]
