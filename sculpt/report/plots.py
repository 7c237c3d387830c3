"""Pictures of results."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sculpt.storage.files import replacing_file

if TYPE_CHECKING:
    from sculpt.report.results import Results
    from sculpt.task.table import TaskRow

INK, MUTED, EMPTY = "#1b1f24", "#6b7480", "#f1f3f5"


def plot_matrices(results: Results, path: Path) -> None:
    """Draw the accuracy matrices (generated answers) of all methods side by side into `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from sculpt.report.results import GENERATED

    methods = results.methods
    names = [name.replace(" ", "\n", 1) for name in results.task_names]
    summaries = results.summaries(GENERATED)
    figure = Figure(figsize=(4.6 * len(methods) + 0.9, 5.3), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(methods), squeeze=False)[0]
    figure.subplots_adjust(left=0.125, right=0.915, top=0.74, bottom=0.135, wspace=0.1)
    image: Any = None
    for index, (axis, (method, result)) in enumerate(zip(axes, methods.items(), strict=True)):
        image = _heat_map(axis, result.generated)
        axis.set_xticks(range(len(names)), names, fontsize=10.5, color=INK)
        axis.set_yticks(range(len(names)), names if index == 0 else [], fontsize=10.5, color=INK)
        axis.set_xlabel("accuracy on this task", fontsize=10.5, color=MUTED, labelpad=7)
        if index == 0:
            axis.set_ylabel("after training on", fontsize=10.5, color=MUTED, labelpad=7)
        title = "plain full fine-tuning" if method == "plain" else method
        axis.set_title(title, fontsize=14, fontweight="bold", color=INK, loc="left", pad=25)
        figures = summaries[method]
        axis.text(
            0.0,
            1.025,
            f"average accuracy {figures.average_accuracy:.2f}    "
            f"forgetting {figures.forgetting:.2f}",
            transform=axis.transAxes,
            fontsize=10.5,
            color=INK,
        )
    place = axes[-1].get_position()
    bar = figure.colorbar(
        image, cax=figure.add_axes((place.x1 + 0.018, place.y0, 0.014, place.height))
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9, color=MUTED, labelcolor=MUTED, length=2)
    headline = "What is left of earlier tasks after later ones"
    figure.text(0.012, 0.945, headline, fontsize=16, fontweight="bold", color=INK)
    note = f"{results.config['model']}, seed {results.config['seed']}. Share of test texts "
    note += "answered with exactly the right label; read down a column: what pales is forgotten."
    figure.text(0.012, 0.893, note, fontsize=10, color=MUTED)
    with replacing_file(path) as temporary:
        figure.savefig(temporary)


def plot_ranks(rows: Sequence[TaskRow], path: Path, title: str = "What each layer got") -> None:
    """Draw importance and retained fraction of every matrix, by kind and depth, into `path`.

    A kind of matrix is a row of cells, its layers from the first to the last; what was not measured
    stays empty.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds: dict[str, list[TaskRow]] = {}
    for row in rows:
        kinds.setdefault(row.name.rpartition(".")[2], []).append(row)
    depth = max(len(members) for members in kinds.values())
    figure = Figure(figsize=(12, 1.7 + 0.42 * len(kinds)), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.085, right=0.965, top=1 - 0.85 / figure.get_figheight(),
                           bottom=0.55 / figure.get_figheight(), wspace=0.1)  # fmt: skip
    by = next((f" by {row.by}" for row in rows if row.by), "")
    pictures: tuple[tuple[str, str, Callable[[TaskRow], float]], ...] = (
        (
            f"importance{by} (mean 1)",
            "PuBu",
            lambda r: math.nan if r.importance is None else r.importance,
        ),
        ("retained share of the directions", "YlGnBu", lambda r: r.preserved / min(r.shape[-2:])),
    )
    for axis, (name, colours, value) in zip(axes, pictures, strict=True):
        cells = [[value(row) for row in members] for members in kinds.values()]
        cells = [line + [math.nan] * (depth - len(line)) for line in cells]
        finite = [cell for line in cells for cell in line if not math.isnan(cell)]
        image = axis.imshow(cells, vmin=0.0, vmax=max([1.0, *finite]), cmap=colours, aspect="auto")
        axis.set_facecolor(EMPTY)
        axis.set_title(name, fontsize=10.5, color=INK, loc="left")
        axis.set_xlabel("layer", fontsize=9.5, color=MUTED)
        axis.set_xticks(range(0, depth, max(1, depth // 8)))
        axis.set_yticks(
            range(len(kinds)), kinds if axis is axes[0] else [], fontsize=9.5, color=INK
        )
        axis.tick_params(length=0, labelcolor=INK)
        for spine in axis.spines.values():
            spine.set_visible(False)
        bar = figure.colorbar(image, ax=axis, fraction=0.03, pad=0.015)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=8.5, color=MUTED, labelcolor=MUTED, length=2)
    figure.text(0.012, 1 - 0.32 / figure.get_figheight(), title, fontsize=13, fontweight="bold",
                color=INK)  # fmt: skip
    with replacing_file(path) as temporary:
        figure.savefig(temporary)


def _heat_map(axis: Any, values: list[list[float]]) -> Any:
    """Cells from 0 to 1 with their numbers; those that were not evaluated stay empty."""
    image = axis.imshow(values, vmin=0.0, vmax=1.0, cmap="YlGnBu", aspect="equal")
    axis.set_facecolor(EMPTY)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            if not math.isnan(value):
                color = "white" if value > 0.55 else INK
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
                axis.texts[-1].set(
                    fontsize=17, fontweight="bold" if row == len(values) - 1 else 400
                )
    edges = [index - 0.5 for index in range(len(values) + 1)]
    axis.set_xticks(edges, minor=True)
    axis.set_yticks(edges, minor=True)
    axis.grid(which="minor", color="white", linewidth=3)
    axis.tick_params(which="both", length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    return image
