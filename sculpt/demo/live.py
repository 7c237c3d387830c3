"""Progress while the demo runs: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

from sculpt.demo.settings import DemoSettings
from sculpt.runs.state import Progress

# Rough cost of a whole phase in training steps, for the time left.
PHASE_STEPS = {"subspaces": 3.0, "certify": 4.0}
LABELS = {"subspaces": "subspaces", "train": "step", "certify": "certificate", "evaluate": "test"}


class Live:
    """Shows every `Progress` it is told, with the time left of all methods together."""

    def __init__(
        self, console: Console, settings: DemoSettings, methods: Sequence[str], tasks: int
    ) -> None:
        self._console = console
        self._settings = settings
        self._tasks = tasks
        self._start = time.monotonic()
        self._done = dict.fromkeys(methods, 0.0)
        self._totals = {method: self._cost_of(method) for method in methods}
        self._task_index = dict.fromkeys(methods, 0)
        self._current: dict[str, str] = {}
        self._scores: list[str] = []
        self._bars = Bars(
            TextColumn("[bold]{task.description:<7}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._rows = {m: self._bars.add_task(m, total=self._totals[m], status="") for m in methods}
        self._sum = self._bars.add_task("all", total=sum(self._totals.values()), status="")

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def __call__(self, now: Progress) -> None:
        """Show where a method is."""
        if self._current.get(now.method) not in (None, now.task):
            self._task_index[now.method] += 1
        self._current[now.method] = now.task
        self._done[now.method] = self._cost_before(now)
        status = self._status(now)
        row = self._rows[now.method]
        self._bars.update(row, completed=self._done[now.method], status=status)
        self._bars.update(self._sum, completed=sum(self._done.values()), status=self._clock())
        if now.phase == "evaluate":
            self._scores.append(f"{now.scored} {now.accuracy:.2f}")
            if now.done == now.total:
                line = f"{now.method:<7} after {now.task}: {', '.join(self._scores)}"
                self._console.print(line, highlight=False)
                self._scores.clear()
        elif not self._console.is_terminal and self._is_milestone(now):
            self._console.print(
                f"{now.method:<7} {status}  {self._clock()}", highlight=False, soft_wrap=True
            )

    def finished(self, method: str) -> None:
        """Fill the bar of a method that is done."""
        self._done[method] = self._totals[method]
        self._bars.update(self._rows[method], completed=self._totals[method], status="done")

    def _status(self, now: Progress) -> str:
        text = f"{now.task}  {LABELS[now.phase]} {now.done}/{now.total}"
        if now.phase == "train":
            text += f"  loss {now.loss:.3f}  {now.tokens_per_second:.0f} tokens/s"
        return text

    def _clock(self) -> str:
        spent = time.monotonic() - self._start
        share = sum(self._done.values()) / sum(self._totals.values())
        left = _minutes(spent / share - spent) if share > 0.01 else "-:--"
        return f"elapsed {_minutes(spent)}  ETA {left}"

    def _is_milestone(self, now: Progress) -> bool:
        if now.phase == "train":
            return now.done == 1 or now.done % max(1, now.total // 4) == 0
        return now.phase in PHASE_STEPS and now.done == now.total

    def _evaluation(self) -> float:
        """Cost of scoring one task: a forward pass is about a third of a training pass."""
        return self._settings.test_per_task / self._settings.batch_size / 3

    def _phases(self, method: str) -> dict[str, float]:
        own = PHASE_STEPS if method == "sculpt" else dict.fromkeys(PHASE_STEPS, 0.0)
        return {
            "subspaces": own["subspaces"],
            "train": float(self._settings.steps),
            "certify": own["certify"],
        }

    def _cost_of(self, method: str, tasks: int | None = None) -> float:
        tasks = self._tasks if tasks is None else tasks
        return tasks * sum(self._phases(method).values()) + (
            tasks * (tasks + 1) / 2 * self._evaluation()
        )

    def _cost_before(self, now: Progress) -> float:
        index = self._task_index[now.method]
        cost = self._cost_of(now.method, index)
        for phase, whole in self._phases(now.method).items():
            if phase == now.phase:
                return cost + whole * now.done / now.total
            cost += whole
        return cost + self._evaluation() * now.done


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
