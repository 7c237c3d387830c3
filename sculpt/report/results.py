"""Results of a task sequence trained by several methods: `results.json`, figures and tables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sculpt.metrics import METRICS, Summary, summary
from sculpt.runs.directory import RunDirectory
from sculpt.runs.state import MethodResult
from sculpt.storage.files import write_json

GENERATED = "generated answer"
AMONG = "among the task's labels"
ACCURACIES = {
    GENERATED: "the answer that the model gives on its own is exactly the label",
    AMONG: "the label is the most likely one of the task's labels, scored over its full text",
}


class ReportError(ValueError):
    """A run directory cannot be reported; the message says why."""


@dataclass
class Results:
    """A whole run.

    config: the settings; versions: of packages and machine; tasks: name, labels and sizes;
    methods: by name, in the order in which they ran.
    """

    config: dict[str, Any]
    versions: dict[str, Any]
    tasks: list[dict[str, Any]]
    methods: dict[str, MethodResult] = field(default_factory=dict)

    @property
    def task_names(self) -> list[str]:
        return [task["name"] for task in self.tasks]

    def summaries(self, accuracy: str) -> dict[str, Summary]:
        """Metrics of one of the two accuracies, by method."""
        return {name: summary(matrix(result, accuracy)) for name, result in self.methods.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        definitions = {m.name: f"{m.definition} ({m.direction})" for m in METRICS}
        summaries = {accuracy: self.summaries(accuracy) for accuracy in ACCURACIES}
        methods = {
            name: result.to_dict() | {"metrics": {a: vars(summaries[a][name]) for a in ACCURACIES}}
            for name, result in self.methods.items()
        }
        return {
            "config": self.config,
            "versions": self.versions,
            "tasks": self.tasks,
            "definitions": {**ACCURACIES, **definitions},
            "methods": methods,
        }

    def write(self, out: Path) -> None:
        """Write `results.json` into the directory `out`."""
        write_json(out / "results.json", self.to_dict())


def read_results(path: Path) -> Results:
    """What `results.json` of a run directory holds.

    Raises `ReportError` where it is not there yet, damaged, or of something else.
    """
    file = path / "results.json"
    if not path.is_dir():
        raise ReportError(f"{path} is no directory: expected that of a run")
    if not file.is_file():
        state = RunDirectory(path).status()
        raise ReportError(
            f"{path} has no results.json, which is written at the end of a run"
            + (f"; its status.json says {state!r}" if state else "")
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        tasks = [{**task, "name": str(task["name"])} for task in values["tasks"]]
        methods = {name: MethodResult.from_dict(item) for name, item in values["methods"].items()}
        found = Results(values.get("config", {}), values.get("versions", {}), tasks, methods)
        for accuracy in ACCURACIES:
            found.summaries(accuracy)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{file} is damaged or not of a run: {error!r}") from error
    if not methods:
        raise ReportError(f"{file} has no methods")
    return found


def matrix(result: MethodResult, accuracy: str) -> list[list[float]]:
    """The accuracy matrix of one of the two accuracies."""
    return result.generated if accuracy == GENERATED else result.among_labels


def tables(results: Results) -> RenderableType:
    """Everything that was measured, as tables for a terminal."""
    return Group(
        *(_matrix_table(results, accuracy) for accuracy in ACCURACIES),
        _figures_table(results),
        Text(headline(results), style="bold"),
    )


def headline(results: Results) -> str:
    """Average accuracy and forgetting of all methods in one sentence, generated answers."""
    summaries = results.summaries(GENERATED)
    sentences = []
    for name, arrow in (("average_accuracy", "↑"), ("forgetting", "↓")):
        values = [f"{method} {getattr(s, name):.2f}" for method, s in summaries.items()]
        sentences.append(f"{name.replace('_', ' ').capitalize()} {arrow}  {', '.join(values)}.")
    return "  ".join(sentences)


@dataclass(frozen=True)
class Row:
    """One figure of every method.

    cells: how it is shown. values: NaN where there is none. arrow: which direction is better.
    """

    name: str
    arrow: str
    cells: list[str]
    values: list[float]
    meaning: str

    @property
    def best(self) -> float | None:
        """The best value, where one is better than others."""
        finite = [value for value in self.values if math.isfinite(value)]
        if not self.arrow or len(set(finite)) < 2:
            return None
        return max(finite) if self.arrow == "↑" else min(finite)


def figures(methods: Sequence[MethodResult]) -> list[Row]:
    """Everything that was measured of the methods, a row for each figure."""
    rows = []
    for place, accuracy in enumerate(ACCURACIES):
        summaries = [summary(matrix(method, accuracy)) for method in methods]
        for metric in METRICS:
            values = [float(getattr(figures, metric.name)) for figures in summaries]
            if all(map(math.isnan, values)):
                continue
            arrow = "↑" if metric.direction.startswith("higher") else "↓"
            sign = "+" if metric.name.endswith("transfer") else ""
            cells = [f"{value:{sign}.3f}" for value in values]
            meaning = "" if place else metric.definition  # the same for both accuracies
            rows.append(Row(f"{metric.title}, {accuracy}", arrow, cells, values, meaning))
    for name in dict.fromkeys(name for method in methods for name in method.general):
        cells = [method.general.get(name, "-") for method in methods]
        rows.append(Row(name, "", cells, [], "before the first and after the last task"))
    for name, arrow, value_of, show, meaning in _FIGURES:
        values = [float(value_of(method)) for method in methods]
        cells = ["-" if math.isnan(value) else show.format(value) for value in values]
        rows.append(Row(name, arrow, cells, values, meaning))
    return rows


def _leak(part: str) -> Callable[[MethodResult], float]:
    return lambda result: getattr(result.worst_leak, part, math.nan)


def _seconds(*phases: str) -> Callable[[MethodResult], float]:
    return lambda result: sum(result.seconds.get(phase, 0.0) for phase in phases)


# Name, which direction is better, value of a method, how it is shown, and what it says.
_FIGURES: Sequence[tuple[str, str, Callable[[MethodResult], float], str, str]] = (
    ("worst leak of ΔW", "↓", _leak("leak"), "{:.1e}",
     "share of a matrix's change that lies in its protected subspace, worst of all matrices"),
    ("  rounding floor there", "", _leak("floor"), "{:.1e}",
     "what one rounding of the weights leaves by itself"),
    ("time per step", "↓", lambda result: 1000 * result.step_seconds, "{:,.0f} ms",
     "median: forward, backward and optimizer"),
    ("time in steps", "↓", _seconds("train"), "{:.1f} s", "all tasks"),
    ("time for subspaces", "↓", _seconds("subspaces"), "{:.1f} s",
     "decompositions before each task"),
    ("time for checks", "↓", _seconds("certify", "evaluate"), "{:.1f} s",
     "leak certificates and test examples: no part of training"),
    ("time, total", "↓", lambda result: result.total_seconds, "{:.1f} s", "all of the above"),
    ("peak memory", "↓", lambda result: result.peak_memory_bytes / 2**20, "{:,.0f} MiB",
     "of the method's own process, weights and libraries included"),
    ("trainable elements", "", lambda result: result.trainable_elements, "{:,.0f}",
     "numbers that the optimizer moves in one task"),
    ("optimizer state", "↓", lambda result: result.optimizer_state_bytes / 2**20, "{:,.0f} MiB",
     "both moments of AdamW"),
    ("held by the method", "↓", lambda result: result.held_bytes / 2**20, "{:,.0f} MiB",
     "for the matrices: weights before the task, bases, what tasks use, Fisher, earlier adapters"),
)  # fmt: skip


def _matrix_table(results: Results, accuracy: str) -> Table:
    table = Table(
        title=f"Accuracy, {accuracy} (↑ higher is better): {ACCURACIES[accuracy]}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("")
    table.add_column("after training on")
    for name in results.task_names:
        table.add_column(name, justify="right", overflow="fold")
    for method, result in results.methods.items():
        for row, name in enumerate(results.task_names):
            last = row == len(results.tasks) - 1
            cells = [_share(value) for value in matrix(result, accuracy)[row]]
            style = "bold" if last else ""
            table.add_row("" if row else method, name, *cells, style=style, end_section=last)
    return table


def _figures_table(results: Results) -> RenderableType:
    """With what each figure says beside it, or below where many methods leave no space."""
    rows, beside = figures(list(results.methods.values())), len(results.methods) <= 2
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("figure")
    table.add_column("")  # which direction is better
    for method in results.methods:
        table.add_column(method, justify="right", style="bold", no_wrap=beside)
    if beside:
        table.add_column("what it says", style="dim", ratio=1)
    for row in rows:
        table.add_row(Text(row.name), row.arrow, *row.cells, *([row.meaning] if beside else []))
    below = [f"{row.name.strip()}: {row.meaning}" for row in rows if row.meaning and not beside]
    return Group(table, Text("\n".join(below), style="dim"))


def _share(value: float) -> str:
    return "·" if math.isnan(value) else f"{value:.2f}"  # not evaluated
