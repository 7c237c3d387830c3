"""Pictures of results, beside their files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.cases import RATIOS
from bench.continual_table import accuracy, by_variant, held, mean, runs_in, shared
from bench.tables import best
from sculpt.storage.files import replacing_file

INK, OURS, THEIRS, THIRD = "#1b1f24", "#0b6e4f", "#9aa5b1", "#d08c1f"
Paint = Callable[[Any, Any], None]


def _figure(path: Path, paint: Paint, content: Any) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    paint(figure, content)
    with replacing_file(path) as temporary:
        figure.savefig(temporary, metadata={"Software": None})


def continual(folder: Path) -> None:
    """Average accuracy against seconds of a run, and against what a method holds."""
    runs = [run for run in runs_in(folder) if not run["search"]]
    if runs:
        _figure(folder / "continual.png", _continual, runs)


def gpu(path: Path) -> None:
    """One picture for each table of a file of `bench.gpu` that has one."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for key, paint in {"rows": _kernels, "subspaces": _subspaces, "training": _training}.items():
        if content.get(key):
            _figure(path.with_name(f"{path.stem}-{key}.png"), paint, content[key])


def _continual(figure: Any, runs: list[Any]) -> None:
    late = " (shared machine: no measurement)" if any(map(shared, runs)) else ""
    panels = {
        f"seconds of a run{late}": lambda run: run["total_seconds"],
        "MiB held beside weights and gradients": held,
    }
    for axis, (title, value) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        axis.margins(0.08)
        found = by_variant(runs)
        # Names beside the axis, in the order of their points, do not hide each other.
        for place, (variant, mine) in enumerate(found.items()):
            color = THIRD if variant.startswith("sculpt") else INK
            point = mean(mine, value), mean(mine, accuracy)
            axis.scatter(*point, s=40, color=color, zorder=3)
            axis.annotate(
                variant,
                point,
                xytext=(1.03, 0.97 - 0.94 * place / max(1, len(found) - 1)),
                textcoords="axes fraction",
                color=color,
                va="center",
                arrowprops={"arrowstyle": "-", "color": color, "alpha": 0.35, "linewidth": 0.8},
            )
        axis.set_xlabel(title)
        axis.set_ylabel("average accuracy, generated answers")


def _kernels(figure: Any, rows: list[Any]) -> None:
    """Ratio to the best chain over r/k, one panel for each operation, one line for each matrix."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        words = row["case"].split()
        ratio = next(place for place, word in enumerate(words) if word in RATIOS)
        point = list(RATIOS).index(words[ratio]), best(row)[1]["ratio"]
        lines = panels.setdefault(words[0], {})
        lines.setdefault(" ".join(words[1:ratio]), []).append(point)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (operation, lines) in zip(axes, panels.items(), strict=True):
        for (matrix, points), color in zip(lines.items(), (OURS, THIRD, INK), strict=False):
            axis.plot(*zip(*sorted(points), strict=True), "o-", color=color, label=matrix)
        axis.axhline(1, color=THEIRS, linewidth=1)
        axis.set_xticks(range(len(RATIOS)), list(RATIOS), fontsize=8)
        axis.set_title(operation, fontsize=10)
        axis.legend(fontsize=6.5, frameon=False)
    axes[0].set_ylabel("time / best chain of torch")
    figure.supxlabel("removed rank / shorter side", fontsize=10)


def _subspaces(figure: Any, rows: list[Any]) -> None:
    matrices = list(dict.fromkeys(row["matrix"] for row in rows))
    axes = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axis, matrix in zip(axes, matrices, strict=True):
        mine = sorted((r for r in rows if r["matrix"] == matrix), key=lambda r: -r["seconds"])
        library = ("svd", "eigh")
        colors = [THEIRS if row["method"].startswith(library) else OURS for row in mine]
        axis.barh([row["method"] for row in mine], [row["seconds"] for row in mine], color=colors)
        axis.set_xscale("log")
        axis.set_title(matrix, fontsize=10)
        axis.set_xlabel("seconds")


def _training(figure: Any, rows: list[Any]) -> None:
    sizes = sorted({row["tokens"] for row in rows})
    colors = {"forward": "#2f5d8a", "backward": "#7fa7cc", "optimizer": THIRD, "fold": OURS}
    for axis, tokens in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        mine = [row for row in rows if row["tokens"] == tokens][::-1]
        left = [0.0] * len(mine)
        for phase, color in colors.items():
            widths = [row["phases"][phase] for row in mine]
            names = [row["method"] for row in mine]
            axis.barh(names, widths, left=left, color=color, label=phase)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.set_title(f"{tokens:,} tokens a step", fontsize=10)
        axis.set_xlabel("seconds")
        axis.legend(fontsize=8, frameon=False)
