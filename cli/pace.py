"""How far long work is, how fast it goes and when it ends: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

_STEP = 1 << 20  # bytes between two looks at the clock
_SECONDS = 30.0  # between two lines where there is no terminal

Advance = Callable[[int], None]


def silent(_: int) -> None:
    """Advance without saying so."""


class Pace:
    """Shows stages of work that are measured in bytes of text.

    >>> pace = Pace(Console(quiet=True))
    >>> with pace.stage("reading", total=None) as advance:
    ...     advance(1024)
    """

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, name: str, *, total: int | None) -> Iterator[Advance]:
        """Lend a function that is told of every few bytes done; `total` is None where it is not known."""
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), _Rate(), TimeRemainingColumn(compact=True))
            with Progress(*columns, console=self._console, transient=True) as progress:
                task = progress.add_task(name, total=total)
                yield _in_steps(lambda count: progress.advance(task, count))
        else:
            yield _in_steps(_Lines(self._console, name, total).advance)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_rate(task.completed, task.elapsed or 0.0))


class _Lines:
    def __init__(self, console: Console, name: str, total: int | None) -> None:
        self._console, self._name, self._total = console, name, total
        self._start = self._said = time.monotonic()
        self._done = 0

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._said >= _SECONDS:
            self._said = now
            share = "" if self._total is None else f"{self._done / max(1, self._total):.0%} of "
            done = _rate(self._total or self._done, now - self._start, self._done)
            self._console.print(f"{self._name}: {share}{done}", highlight=False, soft_wrap=True)


def _in_steps(advance: Advance) -> Advance:
    pending = 0

    def add(count: int) -> None:
        nonlocal pending
        pending += count
        if pending >= _STEP:
            advance(pending)
            pending = 0

    return add


def _rate(shown: float, seconds: float, done: float | None = None) -> str:
    per_second = (shown if done is None else done) / max(seconds, 1e-9)
    return f"{shown / 1e6:,.0f} MB, {per_second / 1e6:,.1f} MB/s"
