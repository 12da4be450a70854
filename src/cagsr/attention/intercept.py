"""Listening to the attention calls of chosen modules, without touching the model.

A transformers model looks its attention function up by name at every call: in ``ALL_ATTENTION_FUNCTIONS`` (sdpa, flash,
flex), or, for eager, as ``eager_attention_forward`` among the globals of its own modeling file. Both are dictionaries.
While somebody listens, the function under that name is wrapped; the wrapper calls the function and then tells the
listeners of that very module. Config, masks, modules, and name checks inside transformers see nothing of it, and the
last listener to leave puts the dictionary back as it was.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import GeneralInterface

from cagsr.attention.logsumexp import LogSumExpRecorder


@dataclass(frozen=True)
class Intercepted:
    """One call of an attention function, as the model made it (see ``transformers.integrations.sdpa_attention``)."""

    implementation: str
    """The name it was looked up by: eager, sdpa, flash_attention_2, flex_attention, ..."""
    query: Tensor  # (batch, heads, queries, width), after rotary embedding
    key: Tensor  # (batch, key-value heads, keys, width), cached keys included
    mask: Any
    """None, a boolean or additive ``(batch, 1 | heads, queries, keys)``, ``(batch, keys)`` (flash), or a BlockMask."""
    options: dict[str, Any]
    """The other arguments: scaling, softcap, sliding_window, position_bias, s_aux, is_causal, position_ids, ..."""
    logsumexp: Tensor | None = None
    """``(batch, heads, queries)`` float32 of the scores, where asked for and where the kernel has computed it."""


Listener = Callable[[nn.Module, Intercepted], None]


@dataclass
class _Wrapped:
    namespace: dict[str, Any]
    original: Callable[..., Any]
    wrapper: Callable[..., Any]
    holders: int = 0


_lock = threading.RLock()
_wrapped: dict[tuple[int, str], _Wrapped] = {}
_listeners: dict[nn.Module, list[tuple[Listener, bool]]] = {}
"""Who is told of a module's calls, and whether it wants the log-sum-exp."""


@contextmanager
def listening(modules: Iterable[nn.Module], listener: Listener, logsumexp: bool = False) -> Iterator[None]:
    """Within the context, tell ``listener`` of every attention call that one of ``modules`` makes, after it.

    Contexts may be nested and may overlap in several threads; an exception inside leaves nothing behind. ``logsumexp`` keeps what a
    fused kernel has computed beside the output, where one ran over several queries.
    """
    modules = list(modules)
    entry = (listener, logsumexp)
    names = {(id(namespace), name): namespace for module in modules for namespace, name in lookups(module)}
    with _lock:
        for (address, name), namespace in names.items():
            _hold(address, name, namespace)
        for module in modules:
            _listeners.setdefault(module, []).append(entry)
    try:
        yield
    finally:
        with _lock:
            for module in modules:
                _listeners[module].remove(entry)
                if not _listeners[module]:
                    del _listeners[module]
            for address, name in names:
                _release(address, name)


def lookups(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """List the dictionaries and names where ``module`` may look its attention function up; none: it never does."""
    # The globals of the class's own code, not of the class's file: a subclass may live elsewhere.
    code_globals = getattr(inspect.unwrap(type(module).forward), "__globals__", {})
    interface = code_globals.get("ALL_ATTENTION_FUNCTIONS")
    if not isinstance(interface, GeneralInterface):
        return []
    found = [
        (code_globals, name)
        for name, value in code_globals.items()
        if name.endswith("eager_attention_forward") and callable(value)
    ]
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    for name in interface if implementation is None else [implementation]:
        for mapping in (interface._local_mapping, interface._global_mapping):
            if name in mapping:
                found.append((mapping, name))
                break
    return found


def _hold(address: int, name: str, namespace: dict[str, Any]) -> None:
    entry = _wrapped.get((address, name))
    if entry is None:
        original = namespace[name]
        entry = _wrapped[address, name] = _Wrapped(namespace, original, _wrap(name, original))
        namespace[name] = entry.wrapper
    entry.holders += 1


def _release(address: int, name: str) -> None:
    entry = _wrapped[address, name]
    entry.holders -= 1
    if entry.holders == 0:
        del _wrapped[address, name]
        # Somebody may have registered another function meanwhile: then theirs stays.
        if entry.namespace.get(name) is entry.wrapper:
            entry.namespace[name] = entry.original


@functools.cache
def _wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    # One wrapper a function, whoever listens: a compiled model checks that it is still the one it was compiled with.
    implementation = "eager" if name.endswith("eager_attention_forward") else name
    # Functions differ in the order of scaling and dropout: arguments by position beyond the mask go by their own names.
    extra = list(inspect.signature(original).parameters)[5:]

    @torch.compiler.disable  # what listeners do is no part of the model's graph
    @functools.wraps(original)
    def attention_and_listeners(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # A copy: listeners may come and go in another thread.
        listeners = list(_listeners.get(module, ()))
        if not listeners:
            return original(module, *args, **kwargs)
        options = {**dict(zip(("query", "key", "value", "attention_mask", *extra), args, strict=False)), **kwargs}
        query, key, mask = options.pop("query"), options.pop("key"), options.pop("attention_mask", None)
        options.pop("value", None)  # only its own width matters, and only to the output
        logsumexp = None
        # One query has a single row of scores: not worth watching the kernel.
        wanted = query.shape[2] > 1 and any(logs for _, logs in listeners)
        if wanted and implementation == "sdpa":
            with LogSumExpRecorder() as recorder:
                output = original(module, *args, **kwargs)
            logsumexp = recorder.found(query)
        else:
            output = original(module, *args, **kwargs)
        call = Intercepted(implementation, query, key, mask, options, logsumexp)
        for tell, _ in listeners:
            tell(module, call)
        return output

    return attention_and_listeners
