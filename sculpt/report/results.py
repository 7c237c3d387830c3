"""Results of a task sequence trained by several methods: tables, JSON and picture."""

from __future__ import annotations

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
from sculpt.runs.state import MethodResult
from sculpt.storage.files import write_json

GENERATED = "generated answer"
AMONG = "among the task's labels"
ACCURACIES = {
    GENERATED: "the answer that the model gives on its own is exactly the label",
    AMONG: "the label is the most likely one of the task's labels, scored over its full text",
}


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


def matrix(result: MethodResult, accuracy: str) -> list[list[float]]:
    """The accuracy matrix of one of the two accuracies."""
    return result.generated if accuracy == GENERATED else result.among_labels


def tables(results: Results) -> RenderableType:
    """Everything that was measured, as tables for a terminal."""
    return Group(
        *(_matrix_table(results, accuracy) for accuracy in ACCURACIES),
        _figures_table(results),
        *(Text(f"Budget of {n}: {r.budget}") for n, r in results.methods.items() if r.budget),
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


def _matrix_table(results: Results, accuracy: str) -> Table:
    table = Table(
        title=f"Accuracy, {accuracy} (↑ higher is better): {ACCURACIES[accuracy]}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("after training on", no_wrap=True)
    for index, method in enumerate(results.methods):
        if index:
            table.add_column("")
        for name in results.task_names:
            table.add_column(f"{method}\n{name}", justify="right", overflow="fold")
    for row, name in enumerate(results.task_names):
        cells: list[str] = []
        for result in results.methods.values():
            cells += ["", *(_share(value) for value in matrix(result, accuracy)[row])]
        table.add_row(name, *cells[1:], style="bold" if row == len(results.tasks) - 1 else "")
    return table


def _figures_table(results: Results) -> Table:
    methods = results.methods
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("figure")
    table.add_column("")  # which direction is better
    for method in methods:
        table.add_column(method, justify="right", style="bold", no_wrap=True)
    table.add_column("what it says", style="dim", ratio=1)
    for position, accuracy in enumerate(ACCURACIES):
        summaries = results.summaries(accuracy)
        for metric in METRICS:
            values = [getattr(summaries[name], metric.name) for name in methods]
            if all(math.isnan(value) for value in values):
                continue
            arrow = "↑" if metric.direction.startswith("higher") else "↓"
            name = f"{metric.title}, {accuracy}"
            signed = metric.name.endswith("transfer")
            cells = [f"{value:+.3f}" if signed else f"{value:.3f}" for value in values]
            meaning = "" if position else metric.definition  # the same for both accuracies
            table.add_row(Text(name), arrow, *cells, meaning)
        table.add_section()
    for name in dict.fromkeys(name for result in methods.values() for name in result.general):
        cells = [result.general.get(name, "-") for result in methods.values()]
        table.add_row(
            Text(name), "", *cells, "by lm-eval, before the first and after the last task"
        )
    for name, arrow, show, meaning in _FIGURES:
        table.add_row(name, arrow, *(show(result) for result in methods.values()), meaning)
    return table


def _share(value: float) -> str:
    return "·" if math.isnan(value) else f"{value:.2f}"


def _leak(result: MethodResult) -> str:
    worst = result.worst_leak
    return "-" if worst is None else f"{worst.leak:.1e}"


def _floor(result: MethodResult) -> str:
    worst = result.worst_leak
    return "-" if worst is None else f"{worst.floor:.1e}"


def _megabytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _milliseconds(seconds: float) -> str:
    return "-" if math.isnan(seconds) else f"{1000 * seconds:,.0f} ms"


def _seconds(*phases: str) -> Callable[[MethodResult], str]:
    return lambda result: f"{sum(result.seconds.get(phase, 0.0) for phase in phases):.1f} s"


_FIGURES: Sequence[tuple[str, str, Callable[[MethodResult], str], str]] = (
    (
        "worst leak of ΔW",
        "↓",
        _leak,
        "share of a matrix's change that lies in its protected subspace, worst of all matrices",
    ),
    ("  rounding floor there", "", _floor, "what one rounding of the weights leaves by itself"),
    (
        "time per step",
        "↓",
        lambda result: _milliseconds(result.step_seconds),
        "median: forward, backward and optimizer",
    ),
    ("time in steps", "↓", _seconds("train"), "all tasks"),
    ("time for subspaces", "↓", _seconds("subspaces"), "decompositions before each task"),
    (
        "time for checks",
        "↓",
        _seconds("certify", "evaluate"),
        "leak certificates and test examples: no part of training",
    ),
    ("time, total", "↓", lambda result: f"{result.total_seconds:.1f} s", "all of the above"),
    (
        "peak memory",
        "↓",
        lambda result: _megabytes(result.peak_memory_bytes),
        "of the method's own process, weights and libraries included",
    ),
    (
        "trainable elements",
        "",
        lambda result: f"{result.trainable_elements:,}",
        "numbers that the optimizer moves in one task",
    ),
    (
        "optimizer state",
        "↓",
        lambda result: _megabytes(result.optimizer_state_bytes),
        "both moments of AdamW",
    ),
    (
        "held by the method",
        "↓",
        lambda result: _megabytes(result.held_bytes),
        "for the trained matrices: weights before the task, bases, Fisher, earlier adapters",
    ),
)
