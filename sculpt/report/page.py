"""From run directories to the page: reads `results.json` and fills the template."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from sculpt.config import SculptConfig
from sculpt.metrics import METRICS, summary
from sculpt.report import charts
from sculpt.report.layers import layers_of
from sculpt.report.results import ACCURACIES, AMONG, GENERATED
from sculpt.report.spectra import Progress, Spectrum, cost, spectra
from sculpt.runs.state import MethodResult
from sculpt.storage.weights import StoredWeights, StoredWeightsError
from sculpt.task.ranks import with_ranks

# About a minute on two cores.
AFFORDABLE = 1e12
INDEX = re.compile(r"\.(\d+)\.")


class ReportError(ValueError):
    """A run directory cannot be reported; the message says why."""


@dataclass
class Column:
    """One method of one run, as the page shows it side by side with the others."""

    name: str
    run: str
    result: MethodResult
    summaries: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Columns that share their tasks, and so their charts. first: number of the first colour."""

    title: str
    tasks: list[str]
    columns: list[Column]
    first: int


@dataclass(frozen=True)
class Run:
    """What a run directory says."""

    path: Path
    name: str
    config: dict[str, Any]
    versions: dict[str, Any]
    tasks: list[str]
    columns: list[Column]

    @property
    def about(self) -> str:
        """What it trained, in one line."""
        model = str(self.config.get("model", "a model")).replace("\\", "/").rstrip("/")
        return (
            f"{len(self.tasks)} tasks in a row, {', then '.join(self.tasks)}, on "
            f"{model.rpartition('/')[2]}, seed {self.config.get('seed', '-')}."
        )

    @property
    def sculpt_config(self) -> SculptConfig | None:
        """The configuration of the matrices, as far as the run tells."""
        fields = self.config.get("sculpt")
        try:
            if isinstance(fields, dict):
                config = SculptConfig(**fields)
                return config if config.ranks is None else with_ranks(config, self._last_ranks())
            if isinstance(self.config.get("ratio"), float):
                return SculptConfig(unfreeze_rank_ratio=self.config["ratio"])
        except (TypeError, ValueError):
            return None
        return None

    def _last_ranks(self) -> dict[str, int]:
        """Preserved rank of each matrix in the last task."""
        chosen = [c.result.subspaces[-1] for c in self.columns if c.result.subspaces]
        return {row["name"]: row["preserved"] for rows in chosen for row in rows}


def read_run(path: Path) -> Run:
    """Read `results.json` of a run directory.

    Raises:
        ReportError: it is not there yet, damaged, or of something else.
    """
    file = path / "results.json"
    if not path.is_dir():
        raise ReportError(f"{path} is no directory: expected that of a run")
    if not file.is_file():
        state = ""
        if (path / "status.json").is_file():
            state = f"; its status.json says {_state(path / 'status.json')!r}"
        raise ReportError(
            f"{path} has no results.json, which is written at the end of a run{state}"
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        tasks = [str(task["name"]) for task in values["tasks"]]
        columns = []
        for name, item in values["methods"].items():
            result = MethodResult.from_dict(item)
            summaries = {a: summary(_matrix(result, a)) for a in ACCURACIES}
            columns.append(Column(name, path.resolve().name, result, summaries))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{file} is damaged or not of a run: {error!r}") from error
    if not columns:
        raise ReportError(f"{file} has no methods")
    name = path.resolve().name
    return Run(path, name, values.get("config", {}), values.get("versions", {}), tasks, columns)


def _state(file: Path) -> str:
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["state"])
    except (OSError, ValueError, KeyError, TypeError):
        return "nothing that can be read"


def _matrix(result: MethodResult, accuracy: str) -> list[list[float]]:
    return result.generated if accuracy == GENERATED else result.among_labels


def report(
    paths: Sequence[Path], *, with_spectra: bool | None = None, progress: Progress | None = None
) -> str:
    """The page for one or more run directories.

    Args:
        with_spectra: compute singular values of the saved models; None: where that takes about a
            minute at most.

    Raises:
        ReportError: a directory cannot be reported.
    """
    from jinja2 import Environment

    runs = [read_run(path) for path in paths]
    columns = [column for run in runs for column in run.columns]
    if len(runs) > 1:
        for column in columns:
            if column.name != column.run:
                column.name = f"{column.run}: {column.name}"
    _make_unique(columns)
    groups = _groups(runs, columns)
    template = resources.files("sculpt.report").joinpath("report.html.j2").read_text("utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"share": _share, "shade": _shade, "short": _short}
    return environment.from_string(template).render(
        runs=runs,
        columns=columns,
        accuracies=[
            {
                "name": name,
                "meaning": ACCURACIES[name],
                "matrix": lambda c, n=name: _matrix(c.result, n),
            }
            for name in (GENERATED, AMONG)
        ],
        abouts=list(dict.fromkeys(run.about for run in runs)),
        figures=_figures(columns),
        curves=[(group, _curves(group)) for group in groups],
        forgetting=[(group, _forgetting(group)) for group in groups],
        times=charts.stacks({c.name: c.result.seconds for c in columns}, "seconds by phase", "s"),
        leaks=[(c, _grid_of_leaks(c)) for c in columns if c.result.certificates],
        layers=[(run, found) for run in runs if (found := layers_of(run.path))],
        spectra=[(run, _spectra(run, with_spectra, progress)) for run in runs if _has_spectra(run)],
        metrics=METRICS,
    )


def _groups(runs: list[Run], columns: list[Column]) -> list[Group]:
    """One of all runs, where they have the same tasks; otherwise one of each."""
    if len({tuple(run.tasks) for run in runs}) == 1:
        return [Group("", runs[0].tasks, columns, 0)]
    return [Group(run.name, run.tasks, run.columns, columns.index(run.columns[0])) for run in runs]


def _make_unique(columns: list[Column]) -> None:
    names = [column.name for column in columns]
    for index, column in enumerate(columns):
        if names.count(column.name) > 1:
            column.name = f"{column.name} ({index + 1})"


def _figures(columns: list[Column]) -> list[dict[str, Any]]:
    """Rows of the table of figures; `best` marks the best column where one is better."""
    rows = []
    for accuracy in (GENERATED, AMONG):
        for metric in METRICS:
            values = [getattr(c.summaries[accuracy], metric.name) for c in columns]
            if all(math.isnan(v) for v in values):
                continue
            higher = metric.direction.startswith("higher")
            signed = metric.name.endswith("transfer")
            rows.append(
                _row(
                    f"{metric.title}, {accuracy}",
                    [f"{v:+.3f}" if signed else f"{v:.3f}" for v in values],
                    values,
                    "↑" if higher else "↓",
                    metric.definition,
                )
            )
    for name in dict.fromkeys(name for c in columns for name in c.result.general):
        cells = [c.result.general.get(name, "-") for c in columns]
        rows.append(
            _row(name, cells, [], "", "by lm-eval, before the first and after the last task")
        )
    leaks = [c.result.worst_leak for c in columns]
    rows.append(
        _row(
            "worst leak of ΔW",
            [
                f"{row.leak:.1e} (limit {row.limit:.1e})" if row else "not certified"
                for row in leaks
            ],
            [],
            "↓",
            "share of a matrix's change that lies in its protected subspace",
        )
    )
    for name, unit, scale, meaning in (
        ("step_seconds", "ms", 1e3, "time per step, median"),
        ("total_seconds", "s", 1.0, "time, total"),
        ("peak_memory_bytes", "MiB", 2.0**-20, "peak memory of the process"),
        ("optimizer_state_bytes", "MiB", 2.0**-20, "optimizer state"),
        ("trainable_elements", "", 1.0, "trainable elements"),
    ):
        values = [float(getattr(c.result, name)) * scale for c in columns]
        shown = [f"{v:,.0f} {unit}".strip() for v in values]
        if "plain" in columns[0].name and values[0]:
            shown = [
                s if not i else f"{s} ({v / values[0]:.2f}x)"
                for i, (s, v) in enumerate(zip(shown, values, strict=True))
            ]
        rows.append(_row(meaning, shown, [] if not unit else values, "↓" if unit else "", ""))
    return rows


def _row(
    name: str, shown: list[str], values: list[float], arrow: str, meaning: str
) -> dict[str, Any]:
    finite = [v for v in values if math.isfinite(v)]
    best = None
    if len(finite) > 1 and max(finite) > min(finite):
        best = max(finite) if arrow == "↑" else min(finite)
    return {
        "name": name,
        "cells": [
            {"text": text, "best": bool(values) and values[i] == best}
            for i, text in enumerate(shown)
        ],
        "arrow": arrow,
        "meaning": meaning,
    }


def _curves(group: Group) -> str:
    series = {column.name: column.result.losses for column in group.columns}
    label = f"training loss {group.title}".rstrip()
    return charts.curves(series, group.tasks, label, group.first)


def _forgetting(group: Group) -> str:
    """Best score ever minus the last one, of each task but the last."""
    tasks = group.tasks[:-1]
    series = {}
    for column in group.columns:
        matrix = column.result.generated
        series[column.name] = [
            max((row[j] for row in matrix if math.isfinite(row[j])), default=math.nan)
            - matrix[-1][j]
            for j in range(len(tasks))
        ]
    if not tasks:
        return ""
    label = f"forgetting {group.title}".rstrip()
    return charts.bars(tasks, series, label, signed=True, first=group.first)


def _place(name: str) -> tuple[str, int]:
    """Kind of a matrix and index of its layer, from its name."""
    found = INDEX.search(name)
    if found is None:
        return name, 0
    return name[: found.start()].rpartition(".")[2] + "." + name[found.end() :], int(found[1])


def _grid(values: dict[str, float]) -> dict[str, Any]:
    """Rows: kinds of matrices, columns: layers."""
    places = {name: _place(name) for name in values}
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    layers = sorted({layer for _, layer in places.values()})
    cells: dict[str, dict[int, Any]] = {kind: {} for kind in kinds}
    for name, (kind, layer) in places.items():
        cells[kind][layer] = {"name": name, "value": values[name]}
    return {"kinds": kinds, "layers": layers, "cells": cells}


def _grid_of_leaks(column: Column) -> dict[str, Any]:
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
    rows.sort(key=lambda item: -item["share"])
    most = max(change.values(), default=1.0) or 1.0
    return {
        "leak": _grid(worst),
        "change": _grid({name: value / most for name, value in change.items()}),
        "most": most,
        "rows": rows[:12],
        "ok": all(certificate.ok for certificate in column.result.certificates),
        "count": len(rows),
        "protected": sorted({c.protected for c in column.result.certificates}),
    }


def _names(run: Run) -> list[str]:
    for column in run.columns:
        if column.result.certificates:
            return [row.name for row in column.result.certificates[0].rows]
    return []


def _has_spectra(run: Run) -> bool:
    return bool(_names(run)) and (run.path / "model").is_dir() and run.sculpt_config is not None


def _spectra(run: Run, wanted: bool | None, progress: Progress | None) -> dict[str, Any]:
    """Spectra of the final model by kind of matrix, or why there are none."""
    config, names = run.sculpt_config, _names(run)
    assert config is not None
    if wanted is False:
        return {"reason": "left out by --no-spectra"}
    try:
        weights = StoredWeights(run.path / "model")
        names = [name for name in names if f"{name}.weight" in weights.tensors]
        if wanted is None and cost(weights, names) > AFFORDABLE:
            return {"reason": "left out, they take more than a minute here: --spectra"}
        found = spectra(run.path / "model", names, config, progress)
    except StoredWeightsError as error:
        return {"reason": str(error)}
    groups: dict[str, list[Spectrum]] = {}
    for item in found:
        groups.setdefault(_place(item.name)[0], []).append(item)
    pictures = []
    for kind, members in groups.items():
        last = max(1, max(_place(member.name)[1] for member in members))
        lines = [(member.shares, _place(member.name)[1] / last) for member in members]
        first = members[0]
        ranks = sorted({member.preserved for member in members})
        pictures.append(
            {
                "kind": kind,
                "size": first.size,
                "ranks": f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
                "svg": charts.spectrum(lines, first.preserved / first.size, f"spectra of {kind}"),
            }
        )
    return {
        "pictures": pictures,
        "energy": _grid({item.name: item.energy for item in found}),
        "count": len(found),
    }


def _share(value: float) -> str:
    return "·" if math.isnan(value) else f"{value:.2f}"


def _shade(value: float) -> str:
    """A share in [0, 1] as the percentage of colour in a cell."""
    return "0" if math.isnan(value) else f"{100 * min(1.0, max(0.0, value)):.0f}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
    return text if len(text) <= 160 else text[:157] + "..."
