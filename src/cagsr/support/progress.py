"""Where long work is: a bar on a terminal, elsewhere a line by the clock, however long one unit of the work takes.

Work tells what it does where it does it (:func:`working`, :func:`each`), in every room and at every depth. Whoever talks
to a user opens :func:`shown` around it: every command does, and so do ``train`` and the trainers when they are called from
Python. Without it, in a library call, nothing is printed. Progress goes to standard error, rows go to standard output.

Lines come from a thread of their own, so that a forward pass or a saved file of minutes does not silence them. Work that is
over before ``FIRST`` seconds prints nothing.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

T = TypeVar("T")

FIRST = 10.0
"""Seconds after which work counts as long, and its first line is printed."""
EVERY = 25.0
"""Seconds from line to line: below the half minute that is promised, for a busy machine may wake a thread late."""
_POLL = 1.0
"""Seconds between looks at the clock, at most."""
_CURRENT: ContextVar[Display | None] = ContextVar("cagsr progress", default=None)


@dataclass(eq=False)
class Task:
    """A piece of work: what it is, how much of it is done, and what is worth saying beside that."""

    what: str
    """As ``scoring``; counted work says ``scoring 16/96 prompts``."""
    total: int | None = None
    """Units of the whole; None: unknown."""
    unit: str = ""
    """What is counted, in the plural; empty where ``what`` says it (``step 3/100``)."""
    done: int = 0
    note: str | Callable[[], str] = ""
    """A few numbers, or who gives them when they are shown."""
    began: float = 0.0
    """On the display's clock."""
    done_before: int = 0
    """Units that were done when it began (a resumed run); they took none of its time."""

    def advance(self, count: int = 1) -> None:
        """Count units as done."""
        self.done += count

    def begin(self, total: int | None, done: int, now: float) -> None:
        """Begin (again) at ``done`` units of ``total``."""
        self.total, self.done, self.done_before, self.began = total, done, done, now

    def counted(self) -> str:
        """How much is done, as ``16/96 prompts``; empty where that isn't known."""
        return "" if self.total is None else f"{self.done:,}/{self.total:,} {self.unit}".rstrip()

    def times(self, now: float) -> str:
        """How long it has taken and what the rest will take at this pace, as ``0:51, 4:15 left``."""
        seconds, units = now - self.began, self.done - self.done_before
        if self.total is None or units <= 0 or self.done >= self.total:
            return duration(seconds)
        return f"{duration(seconds)}, {duration(seconds / units * (self.total - self.done))} left"

    def told(self) -> str:
        """The note as it is now."""
        return self.note if isinstance(self.note, str) else self.note()

    def line(self, now: float) -> str:
        """Everything, as ``step 3/100 (1:20, 43:07 left)  reward 0.61``."""
        return f"{self.what} {self.counted()}".rstrip() + f" ({self.times(now)})  {self.told()}".rstrip()


def duration(seconds: float) -> str:
    """Write seconds as ``4:15`` or ``1:02:03``."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Display:
    """Shows the work that goes on, outermost first: a bar for each on a terminal, else one line now and then.

    ``name`` is said where nothing is known of the work; the first line comes after ``first`` seconds on ``clock`` (None:
    ``FIRST``), further ones ``every`` seconds (None: ``EVERY``).
    """

    def __init__(
        self,
        name: str,
        console: Console | None = None,
        *,
        first: float | None = None,
        every: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self.resting = False
        """Nothing is said meanwhile."""
        self._name = name
        self._console = console or Console(stderr=True, soft_wrap=True, highlight=False)
        self._terminal = self._console.is_terminal
        self._every = EVERY if every is None else every
        self._began = clock()
        self._due = self._began + (FIRST if first is None else first)
        self._poll = min(_POLL, self._every / 4)
        self._tasks: list[Task] = []
        self._live: Live | None = None
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="cagsr-progress", daemon=True)

    def __enter__(self) -> Display:
        if not self._terminal:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:  # a line that is being printed is printed whole, and none comes after
            self._over.set()
        self._tasks.clear()
        self._stop_bars()
        if self._thread.is_alive():
            self._thread.join()

    def begin(self, task: Task) -> None:
        """Show a task until its end, as part of those that have begun."""
        task.begin(task.total, task.done, self.clock())
        self._tasks.append(task)
        if self._terminal and self._live is None:
            from rich.live import Live

            self._live = Live(
                console=self._console,
                get_renderable=self._bars,
                refresh_per_second=5,
                transient=True,
                # Only a terminal's output is put above the bars: rows that go to a file must not end up there.
                redirect_stdout=sys.stdout.isatty(),
            )
            self._live.start()

    def end(self, task: Task) -> None:
        """Show a task, and what began within it, no longer."""
        # An exception that is on its way keeps generators, and so the tasks of each(), alive: the outer task ends them too.
        if task in self._tasks:
            del self._tasks[self._tasks.index(task) :]
        if not self._tasks:
            self._stop_bars()

    def say(self, sentence: str) -> None:
        """Print a sentence, above the bars if there are any."""
        with self._lock:
            self._console.print(sentence, markup=False, highlight=False)

    def tick(self) -> None:
        """Print where the work is, if it is time to."""
        with self._lock:
            now = self.clock()
            if self._over.is_set() or self.resting or now < self._due:
                return
            self._due = now + self._every
            tasks = list(self._tasks)
            line = " > ".join(task.line(now) for task in tasks) or f"{self._name} ({duration(now - self._began)})"
            try:
                # Not through rich, which takes a broken pipe here for one of standard output and closes that.
                print(line, file=self._console.file, flush=True)
            except (OSError, ValueError):  # nobody listens any more: no reason to stop working
                self.resting = True

    def _watch(self) -> None:
        while not self._over.wait(self._poll):
            self.tick()

    def _stop_bars(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _bars(self) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid, now = Table.grid(padding=(0, 1)), self.clock()
        for task in list(self._tasks):
            bar = ProgressBar(total=task.total, completed=task.done, width=24)
            texts = (task.what, task.counted(), task.times(now), task.told())
            what, counted, times, note = (Text(text, no_wrap=True, overflow="ellipsis") for text in texts)
            grid.add_row(what, bar, counted, times, note)
        return grid


@contextmanager
def shown(name: str) -> Iterator[None]:
    """Show the work of this block (or function), unless it is shown already or this is not the main process.

    ``name`` is said where nothing is known of the work, as ``cagsr sft``.
    """
    # RANK is what torchrun and accelerate tell their processes, before any of them has begun.
    if _CURRENT.get() is not None or os.environ.get("RANK", "0") != "0":
        yield
        return
    with Display(name) as display:
        before = _CURRENT.set(display)
        try:
            yield
        finally:
            _CURRENT.reset(before)


@contextmanager
def resting() -> Iterator[None]:
    """Say nothing while this block runs: a server waits for visitors, a program that was started speaks for itself."""
    display = _CURRENT.get()
    if display is None:
        yield
        return
    before, display.resting = _CURRENT.set(None), True
    try:
        yield
    finally:
        display.resting = False
        _CURRENT.reset(before)


@contextmanager
def working(what: str, total: int | None = None, unit: str = "", *, done: int = 0) -> Iterator[Task]:
    """Tell that this block (or function) does ``what``; yields the task (see there), which is told what was done."""
    task, display = Task(what, total, unit, done), _CURRENT.get()
    if display is None:
        yield task
        return
    display.begin(task)
    try:
        yield task
    finally:
        display.end(task)


def each(what: str, items: Sequence[T], unit: str = "") -> Iterator[T]:
    """Iterate over items, and tell that this is ``what`` is done with them; an item counts once the next is asked for."""
    with working(what, len(items), unit) as task:
        for item in items:
            yield item
            task.advance()


def now() -> float:
    """Seconds on the clock of whatever shows the work."""
    display = _CURRENT.get()
    return time.monotonic() if display is None else display.clock()


def say(*sentences: str) -> None:
    """Print notes or warnings to standard error, each on a line, above the bars if there are any."""
    display = _CURRENT.get()
    for sentence in sentences:
        if display is None:
            Console(stderr=True, soft_wrap=True, highlight=False).print(sentence, markup=False)
        else:
            display.say(sentence)
