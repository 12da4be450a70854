"""A user's own reward functions, named by dotted path: terms of ours, or TRL's functions as they are."""

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from cagsr.config.validation import checked, types_of
from cagsr.errors import CagsrError, ConfigError, RewardError
from cagsr.flow import Prompt, RewardBatch
from cagsr.reward.registry import Resources, TermConfig, settings_class
from cagsr.reward.term import UNKNOWN, PartialValues, RewardTerm
from cagsr.reward.trainer_calls import TRAINER_ARGUMENTS, no_trainer
from cagsr.reward.values import quote_prompt
from cagsr.support.dotted_path import import_dotted

TRL_ARGUMENTS = frozenset({"prompts", "completions", "completion_ids"})


def load_function(
    path: str,
    name: str | None = None,
    settings: Mapping[str, Any] | None = None,
    resources: Resources = Resources(),  # noqa: B008  (frozen)
) -> RewardTerm:
    """Turn a dotted path, ``package.module.name``, into a reward term.

    Taken as they are: a :class:`RewardTerm` object or a class of them that needs no argument, a function of one
    RewardBatch, and TRL's ``f(prompts, completions, completion_ids, **columns) -> list[float | None]``, known by its
    argument names. It may ask for ``trainer_state``, ``log_metric`` and ``log_extra`` too, and be a coroutine function.

    ``name`` is that of a plain function's term (None: the last part of the path); terms keep their own. A class of terms
    gets ``settings``, the fields of its dataclass, and what its ``needs`` name of ``resources``. ConfigError: the path
    can't be imported, is not callable, takes neither form of arguments, or is a coroutine function of a RewardBatch.
    """
    found = import_dotted(path)
    name = name or path.rpartition(".")[2]
    if inspect.isclass(found):
        found = _made(found, path, settings or {}, resources)
    elif settings:
        raise ConfigError(f"reward.function_settings: {path!r} is no class, so it takes no settings")
    if not callable(found):
        raise ConfigError(f"reward.functions: {path!r} is {type(found).__name__}, not a function")
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"reward.functions: the arguments of {path!r} can't be read; wrap it in a function"
        ) from error
    keywords = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if keywords & (TRL_ARGUMENTS | TRAINER_ARGUMENTS) or (takes_all and not required):
        missing = frozenset(p.name for p in required) - TRL_ARGUMENTS - TRAINER_ARGUMENTS
        if "environments" in missing:
            raise ConfigError(
                f"reward.functions: {path!r} asks for environments, which TRL's trainers make of an environment_factory; "
                "there are none here: give the argument a default"
            )
        return TextFunction(name, found, None if takes_all else frozenset(keywords), missing)
    if len(required) == 1 and required[0].kind is not inspect.Parameter.KEYWORD_ONLY:
        if inspect.iscoroutinefunction(found) or inspect.iscoroutinefunction(type(found).__call__):
            raise ConfigError(
                f"reward.functions: {path!r} is a coroutine function of a batch; give a plain function (TRL's forms may be "
                "coroutines)"
            )
        if isinstance(found, RewardTerm) and isinstance(found.name, str):
            return found
        return BatchFunction(name, found, getattr(found, "needs", UNKNOWN))
    raise ConfigError(
        f"reward.functions: {path!r} takes ({', '.join(p.name for p in parameters)}); write f(batch) or TRL's "
        "f(prompts, completions, completion_ids, **columns)"
    )


def _made(cls: Any, path: str, settings: Mapping[str, Any], resources: Resources) -> Any:
    """A term of a class, with its settings if it has any, and what it needs."""
    kind: Any = settings_class(cls)
    if not is_dataclass(kind) and settings:
        raise ConfigError(
            f"reward.function_settings: {path!r} has no settings (a dataclass that annotates its ``settings``)"
        )
    try:
        needed = resources.given(getattr(cls, "needs", ()), path)
        if not is_dataclass(kind):
            return cls(**needed)
        types = types_of(kind)
        if "weight" in settings and isinstance(kind, type) and issubclass(kind, TermConfig):
            raise ConfigError(f"reward.function_settings: the weight of {path!r} is given by reward.function_weights")
        unknown = next((key for key in settings if key not in types), None)
        if unknown is not None:
            raise ConfigError(f"reward.function_settings: {path!r} has no setting {unknown!r}; it has {sorted(types)}")
        given = {key: checked(types[key], value, f"reward.function_settings {key}") for key, value in settings.items()}
        values: Any = kind(**given)  # type: ignore[operator]
        return cls(values, **needed)
    except TypeError as error:
        raise ConfigError(
            f"reward.functions: class {path!r} can't be made without arguments ({error}); name an instance"
        ) from error


@dataclass(frozen=True)
class BatchFunction:
    """A function of one RewardBatch, with a name."""

    name: str
    function: Callable[[RewardBatch], Tensor | PartialValues]
    needs: frozenset[str] = UNKNOWN
    """As the function's own attribute ``needs`` says."""

    def __call__(self, batch: RewardBatch) -> Tensor | PartialValues:
        """Return what the function returns."""
        return self.function(batch)


@dataclass(frozen=True)
class TextFunction:
    """A TRL reward function: texts, the data's columns and the trainer in, one number or None for each answer out."""

    name: str
    function: Callable[..., Iterable[float | None] | Awaitable[Iterable[float | None]]]
    accepts: frozenset[str] | None
    """Names of its arguments; None: it takes any (``**kwargs``)."""
    columns: frozenset[str] = frozenset()
    """Columns it can't do without."""
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch: RewardBatch) -> PartialValues:
        """Return ``(batch,)`` values; None becomes "does not apply".

        RewardError: a column it asks for is missing, or it returns something else than one number or None for each answer.
        """
        episodes = batch.episodes
        prompts = episodes.prompts.prompts
        arguments = text_arguments(prompts, episodes.completions)
        arguments["completion_ids"] = [
            ids[mask].tolist() for ids, mask in zip(episodes.ids, episodes.sampled, strict=True)
        ]
        arguments |= (batch.trainer or no_trainer()).arguments(self.name, len(prompts))
        missing = sorted(self.columns - set(arguments))
        if missing:
            there = sorted(set(arguments) - TRL_ARGUMENTS - TRAINER_ARGUMENTS)
            raise RewardError(
                f"reward function {self.name!r} asks for the column {missing[0]!r}, but the prompts have the columns "
                f"{there}: add the column to the data or give the argument a default"
            )
        if self.accepts is not None:
            arguments = {key: value for key, value in arguments.items() if key in self.accepts}
        try:
            returned = self.function(**arguments)
            given = list(_finished(returned) if inspect.isawaitable(returned) else returned)
        except CagsrError:
            raise
        except Exception as error:  # a user's code can raise anything; the cause stays attached
            raise RewardError(
                f"reward function {self.name!r} failed with {type(error).__name__}: {error}; mend the function"
            ) from error
        if len(given) != len(prompts):
            raise RewardError(
                f"reward function {self.name!r} returned {len(given)} values for {len(prompts)} answers; return one "
                "number (or None) for each"
            )
        device = episodes.ids.device
        values = [
            0.0 if value is None else self._number(value, prompt) for value, prompt in zip(given, prompts, strict=True)
        ]
        applies = [value is not None for value in given]
        return PartialValues(
            torch.tensor(values, device=device), torch.tensor(applies, dtype=torch.bool, device=device)
        )

    def _number(self, value: Any, prompt: Prompt) -> float:
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"reward function {self.name!r} returned {value!r} for {quote_prompt(prompt)}; return a number or None"
            ) from error


def _finished(coroutine: Awaitable[Iterable[float | None]]) -> Iterable[float | None]:
    """Wait for what a coroutine function returns."""

    async def whole() -> Iterable[float | None]:
        return await coroutine

    return asyncio.run_coroutine_threadsafe(whole(), _event_loop()).result()


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for all calls, in a thread of its own, as TRL has it: what a function opened stays usable in the next call.

    A notebook's loop, which runs already, is left alone.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="reward functions", daemon=True).start()
    return loop


def text_arguments(prompts: Sequence[Prompt], completions: Sequence[str]) -> dict[str, Any]:
    """Lay out texts and columns as TRL's reward functions receive them, the prompt of each answer repeated for its candidates.

    ``prompts`` and ``completions``, as lists of texts or, for conversational prompts, lists of messages, and every
    column of the data as a list with one value for each answer (None where a row lacks it).
    """
    columns: dict[str, Any] = {
        key: [prompt.columns.get(key) for prompt in prompts]
        for key in dict.fromkeys(key for prompt in prompts for key in prompt.columns)
    }
    chats = [None if one.messages is None else [dict(message) for message in one.messages] for one in prompts]
    return {
        **{key: value for key, value in columns.items() if key not in {"prompt", "completion", *TRL_ARGUMENTS}},
        "prompts": [prompt.text if chat is None else chat for prompt, chat in zip(prompts, chats, strict=True)],
        "completions": [
            text if chat is None else [{"role": "assistant", "content": text}]
            for text, chat in zip(completions, chats, strict=True)
        ],
    }
