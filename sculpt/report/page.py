"""One self-contained HTML page of finished runs, from their directories."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from sculpt.inspection.spectra import Progress, spectra, stored_values
from sculpt.metrics import METRICS
from sculpt.report import charts, curvature
from sculpt.report.charts import as_svg, place_of
from sculpt.report.results import ACCURACIES, Results, figures, matrix, read_results
from sculpt.runs.layer_files import adapted
from sculpt.runs.state import MethodResult
from sculpt.storage.weights import StoredWeights, StoredWeightsError
from sculpt.task.table import TaskRow, table_of

AFFORDABLE = 1e12
"""Floating-point operations; about a minute on two cores."""

COMPARED = ("time per step", "time, total", "peak memory", "trainable elements", "optimizer state")
"""Figures that stand beside those of plain fine-tuning as ratios."""

POINTS = 48
"""Singular values that a curve shows."""


@dataclass
class Column:
    """One method of one run, as the page shows it side by side with the others."""

    name: str
    run: str
    result: MethodResult


@dataclass(frozen=True)
class Run:
    """What a run directory says."""

    path: Path
    results: Results
    columns: list[Column]

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def about(self) -> str:
        """What it trained, in one line."""
        config, tasks = self.results.config, self.results.task_names
        model = str(config.get("model", "a model")).replace("\\", "/").rstrip("/")
        return (
            f"{len(tasks)} tasks in a row, {', then '.join(tasks)}, on "
            f"{model.rpartition('/')[2]}, seed {config.get('seed', '-')}."
        )

    @property
    def chosen(self) -> list[TaskRow]:
        """Matrices and ranks in the last task by the last method that chose any: the one whose
        model is saved."""
        last = [column.result.subspaces[-1:] for column in reversed(self.columns)]
        rows = next((rows for [rows] in filter(None, last) if rows), [])
        # NaN is what None becomes in a file.
        known: list[dict[str, Any]] = [
            {name: None if value != value else value for name, value in row.items()} for row in rows
        ]
        return [TaskRow(**row) for row in known]

    @property
    def from_weights(self) -> bool:
        """Whether the last task has its subspaces from the weights."""
        return any(not row.method.startswith("curvature") for row in self.chosen)


@dataclass(frozen=True)
class Group:
    """Columns that share their tasks, and so their charts. first: number of the first colour."""

    title: str
    tasks: list[str]
    columns: list[Column]
    first: int


def report(
    paths: Sequence[Path], *, with_spectra: bool | None = None, progress: Progress | None = None
) -> str:
    """The page for one or more run directories.

    Args:
        with_spectra: compute singular values of the saved models; None: where that takes about a
            minute at most.

    Raises:
        ReportError: a directory cannot be reported.
        ImportError: matplotlib is missing.
    """
    from jinja2 import Environment

    runs = [_read(path) for path in paths]
    columns = [column for run in runs for column in run.columns]
    _name(columns, several=len(runs) > 1)
    groups = _groups(runs, columns)
    template = resources.files("sculpt.report").joinpath("report.html.j2").read_text("utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"short": _short}
    return environment.from_string(template).render(
        palette=charts.PALETTE,
        runs=runs,
        columns=columns,
        abouts=list(dict.fromkeys(run.about for run in runs)),
        figures=_figures(columns),
        accuracies=[(name, meaning, _matrices(runs, name)) for name, meaning in ACCURACIES.items()],
        forgetting=[(group, _forgetting(group)) for group in groups],
        losses=[(group, _losses(group)) for group in groups],
        times=as_svg(charts.stacks({c.name: c.result.seconds for c in columns}, "s"), "seconds"),
        leaks=[(column, _leaks(column)) for column in columns if column.result.certificates],
        curvature=[
            (run, found)
            for run in runs
            if (
                found := curvature.sections(
                    run.chosen,
                    [c for column in run.columns for c in column.result.certificates],
                    run.path / "model",
                    run.name,
                )
            )
        ],
        layers=[(run, found) for run in runs if (found := _layers(run))],
        spectra=[
            (run, _spectra(run, with_spectra, progress))
            for run in runs
            if run.from_weights and (run.path / "model").is_dir()
        ],
        metrics=METRICS,
    )


def _read(path: Path) -> Run:
    results, name = read_results(path), path.resolve().name
    return Run(path, results, [Column(m, name, r) for m, r in results.methods.items()])


def _name(columns: list[Column], *, several: bool) -> None:
    """Give every column a name of its own, with that of its run where there are several."""
    for column in columns:
        if several and column.name != column.run:
            column.name = f"{column.run}: {column.name}"
    names = [column.name for column in columns]
    for index, column in enumerate(columns):
        if names.count(column.name) > 1:
            column.name = f"{column.name} ({index + 1})"


def _groups(runs: list[Run], columns: list[Column]) -> list[Group]:
    """One of all runs, where they have the same tasks; otherwise one of each."""
    if len({tuple(run.results.task_names) for run in runs}) == 1:
        return [Group("", runs[0].results.task_names, columns, 0)]
    return [
        Group(run.name, run.results.task_names, run.columns, columns.index(run.columns[0]))
        for run in runs
    ]


def _figures(columns: list[Column]) -> list[dict[str, Any]]:
    """Rows of the table of figures."""
    plain = "plain" in columns[0].name
    rows = []
    for row in figures([column.result for column in columns]):
        cells = []
        for place, text in enumerate(row.cells):
            value = row.values[place] if row.values else math.nan
            if plain and place and row.name in COMPARED and row.values[0] > 0:
                text += f" ({value / row.values[0]:.2f}x)"
            cells.append({"text": text, "best": row.best is not None and value == row.best})
        rows.append({"row": row, "cells": cells})
    return rows


def _matrices(runs: list[Run], accuracy: str) -> list[tuple[Column, str]]:
    found = []
    for run in runs:
        for column in run.columns:
            picture = charts.matrix(matrix(column.result, accuracy), run.results.task_names)
            found.append((column, as_svg(picture, f"{accuracy} of {column.name}")))
    return found


def _losses(group: Group) -> str:
    series = {column.name: column.result.losses for column in group.columns}
    return as_svg(charts.losses(series, group.tasks, group.first), f"loss {group.title}")


def _forgetting(group: Group) -> str:
    """Best score ever minus the last one, of each task but the last."""
    tasks = group.tasks[:-1]
    if not tasks:
        return ""
    series = {
        column.name: [
            max((row[j] for row in scores if math.isfinite(row[j])), default=math.nan)
            - scores[-1][j]
            for j in range(len(tasks))
        ]
        for column in group.columns
        for scores in [column.result.generated]
    }
    return as_svg(charts.bars(tasks, series, group.first), f"forgetting {group.title}")


def _cells(values: Mapping[str, float], label: str) -> str:
    return as_svg(charts.layers({"": values}), label)


def _leaks(column: Column) -> dict[str, Any]:
    """For every matrix the worst leak of all tasks as a share of its limit, and its change."""
    worst: dict[str, float] = {}
    change: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for certificate in column.result.certificates:
        for row in certificate.rows:
            share = row.leak / row.limit if row.limit else math.inf
            worst[row.name] = max(worst.get(row.name, 0.0), share)
            change[row.name] = max(change.get(row.name, 0.0), row.change)
            rows.append({"task": certificate.task, "row": row, "share": share})
    most = max(change.values(), default=1.0) or 1.0
    moved = {name: value / most for name, value in change.items()}
    return {
        "leak": _cells(worst, f"leak of {column.name}"),
        "change": _cells(moved, f"change of {column.name}"),
        "most": most,
        "rows": sorted(rows, key=lambda item: -item["share"])[:12],
        "ok": all(certificate.ok for certificate in column.result.certificates),
        "count": len(rows),
    }


def _layers(run: Run) -> dict[str, str]:
    """Ranks of the last task where they adapt, or nothing."""
    found = {}
    rows = run.chosen
    if adapted(rows):
        found = {
            "task": run.results.task_names[-1],
            "ranks": as_svg(charts.ranks(rows), f"ranks of {run.name}"),
            "table": table_of(rows),
        }
    return found


def _spectra(run: Run, wanted: bool | None, progress: Progress | None) -> dict[str, Any]:
    """Spectra of the final model by kind of matrix, or why there are none."""
    if wanted is False:
        return {"reason": "left out by --no-spectra"}
    rows = {row.name: row for row in run.chosen}
    try:
        weights = StoredWeights(run.path / "model")
        stored = {name: f"{name}.weight" for name in rows if f"{name}.weight" in weights.tensors}
        shapes = {key: weights.tensors[key].shape for key in stored.values()}
        if wanted is None and sum(map(_cost, shapes.values())) > AFFORDABLE:
            return {"reason": "left out, they take more than a minute here: --spectra"}
        preserved = {key: rows[name].preserved for name, key in stored.items()}
        by_key = spectra(stored_values(weights, shapes), preserved, progress, points=POINTS)
        found = {name: by_key[key] for name, key in stored.items()}
    except StoredWeightsError as error:
        return {"reason": str(error)}
    kinds: dict[str, list[str]] = {}
    for name in found:
        kinds.setdefault(place_of(name)[0], []).append(name)
    pictures = []
    for kind, members in kinds.items():
        last = max(1, max(place_of(name)[1] for name in members))
        lines = [(found[name].curve, place_of(name)[1] / last) for name in members]
        ranks = sorted({rows[name].preserved for name in members})
        size = min(rows[members[0]].shape)
        picture = charts.spectra(lines, rows[members[0]].preserved / size)
        pictures.append(
            {
                "kind": kind,
                "size": size,
                "ranks": f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
                "svg": as_svg(picture, f"spectra of {kind}"),
            }
        )
    energy = {name: spectrum.energy for name, spectrum in found.items()}
    return {"pictures": pictures, "energy": _cells(energy, f"energy of {run.name}")}


def _cost(shape: Sequence[int]) -> float:
    """Floating-point operations that a spectrum takes, roughly."""
    short, long = sorted(shape[-2:])
    return 2.0 * short**2 * long + 3.0 * short**3


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
    return text if len(text) <= 160 else text[:157] + "..."
