"""What the commands print while a run goes on, and at its end."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from sculpt.messages import SculptWarning
from sculpt.models.load import quiet_transformers
from sculpt.report.results import Results, tables
from sculpt.runs.state import Progress

NAMES = {"subspaces": "subspaces", "train": "step", "certify": "certificate", "evaluate": "test"}
STEPS_SHOWN = 10


class Lines:
    """One line for each phase, and a few for the steps of a task.

    steps: of all tasks by all methods, for the time left; 0 where nobody asks for it.
    """

    def __init__(self, console: Console, *, steps: int = 0) -> None:
        self._console = console
        self._start = time.monotonic()
        self._scores: list[str] = []
        self._steps = steps
        self._done: dict[tuple[str, str], int] = {}

    def __call__(self, now: Progress) -> None:
        where = f"{now.method:<16}  {now.task}" if self._steps else now.task
        if now.phase == "evaluate":
            self._scores.append(f"{now.scored} {now.accuracy:.3f}")
            if now.done == now.total:
                self._print(f"{where}: tested: {', '.join(self._scores)}")
                self._scores.clear()
            return
        shown = max(1, now.total // STEPS_SHOWN) if now.phase == "train" else now.total
        if now.phase == "train":
            self._done[now.method, now.task] = now.done
        if now.done % shown == 0 or now.done in (1, now.total):
            line = f"{where}: {NAMES[now.phase]} {now.done}/{now.total}"
            if now.phase == "train":
                line += f"  loss {now.loss:.4f}  {now.tokens_per_second:,.0f} tokens/s"
                line += self._left()
            self._print(line)

    def _left(self) -> str:
        done, spent = sum(self._done.values()), time.monotonic() - self._start
        return f"  ETA {_minutes(spent / done * (self._steps - done))}" if self._steps else ""

    def _print(self, line: str) -> None:
        text = f"{_minutes(time.monotonic() - self._start):>6}  {line}"
        self._console.print(text, soft_wrap=True)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def new_console() -> Console:
    """For results; wide enough for tables where it is no terminal."""
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = 120
    return console


@contextmanager
def notes() -> Iterator[None]:
    """Print our own warnings in a line, and what libraries say not at all."""
    quiet_transformers()
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", SculptWarning)
        warnings.showwarning = lambda message, *_: errors.print(f"note: {message}", style="yellow")
        yield


def show(console: Console, results: Results, folder: Path) -> None:
    """The tables of a run, and where it is."""
    console.print(tables(results))
    console.print(f"Run directory: {folder}", soft_wrap=True)
