"""Charts of results, by matplotlib: as SVG for the page of a report, or as PNG files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sculpt.storage.files import replacing_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sculpt.report.results import Results
    from sculpt.task.table import TaskRow

PALETTE = {
    "ink": "#1b1f24", "muted": "#5d6773", "rule": "#d9dee4", "soft": "#f4f6f8",
    "heat": "#1f6fb1", "bad": "#b3261e",
    "c0": "#c4622d", "c1": "#1f6fb2", "c2": "#2d8a57", "c3": "#8a4fb0", "c4": "#a8861b",
    "c5": "#b23a5e",
    "f0": "#9fb3c8", "f1": "#2470b0", "f2": "#c9a227", "f3": "#6f9c76", "f4": "#8a6fb0",
    "f5": "#b07a6f",
}  # fmt: skip
"""All different: in a page each becomes the variable of its name, so that light and dark work.

`c`: methods, `f`: phases.
"""
INK, MUTED, RULE, HEAT, BAD = (PALETTE[n] for n in ("ink", "muted", "rule", "heat", "bad"))
COLOURS = 6
LAYER = re.compile(r"\.(\d+)\.")


def new_figure(
    width: float, height: float, *, rows: int = 1, columns: int = 1
) -> tuple[Figure, Any]:
    """A figure of so many inches inside of its labels, and its axes, `[rows][columns]`.

    Raises `ImportError`, saying what to install, where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        message = "matplotlib is not installed: pip install 'sculpt-kernels[report]'"
        raise ImportError(message) from None
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(0, 0, 1, 1)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_png(figure: Figure, path: Path) -> None:
    """Write `path`, all at once."""
    with replacing_file(path) as temporary:
        figure.savefig(
            temporary, format="png", dpi=160, facecolor="white", bbox_inches="tight", pad_inches=0.2
        )


def as_svg(figure: Figure, label: str) -> str:
    """Markup to stand in a page: its fonts, its colours, no identifier that another may have."""
    from matplotlib import rc_context

    buffer = StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=nothing, bbox_inches="tight",
            pad_inches=0.03,
        )  # fmt: skip
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    used = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda found: found.group() if found[1] in used else "", text)
    for name, colour in PALETTE.items():
        text = text.replace(colour, f"var(--{name})")
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def _plain(axis: Axes, *, lines: bool = False) -> None:
    """No frame and no ticks, and where asked for lines across."""
    axis.set_frame_on(False)
    axis.tick_params(which="both", length=0, labelcolor=MUTED, labelsize=9)
    axis.set_axisbelow(True)
    if lines:
        axis.grid(axis="y", color=RULE, linewidth=0.8)


def _cells(axis: Axes, values: Sequence[Sequence[float]]) -> None:
    """A rectangle for each value, of full colour at 1 and red beyond; none for NaN."""
    from matplotlib.patches import Rectangle

    for row, line in enumerate(values):
        for column, value in enumerate(line):
            if not math.isnan(value):
                strength = 0.06 + 0.94 * min(1.0, max(0.0, value))
                colour = BAD if value > 1 else HEAT
                corner = (column - 0.45, row - 0.45)
                axis.add_patch(Rectangle(corner, 0.9, 0.9, facecolor=colour, alpha=strength))
    axis.set_xlim(-0.5, max(map(len, values)) - 0.5)
    axis.set_ylim(len(values) - 0.5, -0.5)
    axis.set_aspect("equal")
    _plain(axis)


def _draw_matrix(
    axis: Axes, values: Sequence[Sequence[float]], tasks: Sequence[str], size: float
) -> None:
    """Accuracies from 0 to 1 with their numbers; what was not evaluated stays empty."""
    _cells(axis, values)
    names = [name.replace(" ", "\n", 1) for name in tasks]
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(names)), names)
    axis.xaxis.tick_top()
    for row, line in enumerate(values):
        weight = "bold" if row == len(values) - 1 else "normal"
        for column, value in enumerate(line):
            if math.isfinite(value):
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=size,
                          color="white" if value > 0.55 else INK, fontweight=weight)  # fmt: skip


def matrix(values: Sequence[Sequence[float]], tasks: Sequence[str]) -> Figure:
    """One accuracy matrix. Rows: after training on a task, columns: accuracy on it."""
    figure, [[axis]] = new_figure(0.85 * len(tasks), 0.6 * len(tasks))
    _draw_matrix(axis, values, tasks, 11)
    axis.set_aspect("auto")
    return figure


def matrices(results: Results) -> Figure:
    """The accuracy matrices (generated answers) of all methods, two in a line."""
    from sculpt.report.results import GENERATED

    methods, summaries = results.methods, results.summaries(GENERATED)
    lines, columns = math.ceil(len(methods) / 2), min(2, len(methods))
    figure, axes = new_figure(4.8 * columns, 5.4 * lines - 1.7, rows=lines, columns=columns)
    figure.subplots_adjust(hspace=0.46)
    top = figure.get_figheight()
    figure.suptitle("What is left of earlier tasks after later ones", x=-0.1, y=1 + 1.55 / top,
                    ha="left", fontsize=16, fontweight="bold", color=INK)  # fmt: skip
    figure.text(-0.1, 1 + 1.15 / top,
                f"{results.config['model']}, seed {results.config['seed']}. Share of test texts "
                "answered with exactly the right label; read down a column: what pales is "
                "forgotten.", fontsize=10, color=MUTED)  # fmt: skip
    for axis in axes.flat[len(methods) :]:
        axis.remove()
    for axis, (method, result) in zip(axes.flat, methods.items(), strict=False):
        _draw_matrix(axis, result.generated, results.task_names, 17)
        axis.set_anchor("W")
        axis.tick_params(labelsize=10.5)
        axis.set_title(method, fontsize=14, fontweight="bold", color=INK, loc="left", pad=8)
        of = summaries[method]
        said = f"average accuracy {of.average_accuracy:.2f}    forgetting {of.forgetting:.2f}"
        axis.set_xlabel(said, fontsize=11, color=INK, labelpad=10)
        axis.set_ylabel("after training on", fontsize=10.5, color=MUTED)
    return figure


def place_of(name: str) -> tuple[str, int]:
    """Kind of a matrix and index of its layer, from its name."""
    found = LAYER.search(name)
    if found is None:
        return name, 0
    return name[: found.start()].rpartition(".")[2] + "." + name[found.end() :], int(found[1])


def layers(panels: Mapping[str, Mapping[str, float]]) -> Figure:
    """Shares in [0, 1] by the names of matrices, as cells: a row for each kind, layers along it.

    panels: by title, one below the other. A share beyond 1 is red.
    """
    names = list(dict.fromkeys(name for values in panels.values() for name in values))
    kinds = list(dict.fromkeys(place_of(name)[0] for name in names))
    depth = 1 + max(place_of(name)[1] for name in names)
    side, between = 0.22, 0.6
    height = len(panels) * side * len(kinds) + (len(panels) - 1) * between
    figure, axes = new_figure(side * depth, height, rows=len(panels))
    figure.subplots_adjust(hspace=between / (side * len(kinds)))
    for [axis], (title, values) in zip(axes, panels.items(), strict=True):
        cells = [[math.nan] * depth for _ in kinds]
        for name, value in values.items():
            kind, layer = place_of(name)
            cells[kinds.index(kind)][layer] = value
        _cells(axis, cells)
        axis.set_yticks(range(len(kinds)), kinds)
        axis.set_xticks(range(0, depth, 1 if depth <= 16 else 4))
        axis.xaxis.tick_top()
        axis.set_title(title, fontsize=9.5, color=INK, loc="left", y=1, pad=17)
    return figure


def ranks(rows: Sequence[TaskRow]) -> Figure:
    """Importance of every matrix over the largest, and its retained share, by kind and depth."""
    by = next((f" by {row.by}" for row in rows if row.by), "")
    measured = {row.name: row.importance for row in rows if row.importance is not None}
    most = max([value for value in measured.values() if math.isfinite(value)], default=1.0) or 1.0
    return layers(
        {
            f"importance{by}, full: {most:.3g} times the mean": {
                name: value / most for name, value in measured.items()
            },
            "retained share of the directions": {
                row.name: row.preserved / min(row.shape[-2:]) for row in rows
            },
        }
    )


def losses(
    series: Mapping[str, Sequence[Sequence[float]]], tasks: Sequence[str], first: int = 0
) -> Figure:
    """A line for each method, task after task along one axis; pale: every step.

    series: `[task][step]` by method. first: number of the first colour.
    """
    figure, [[axis]] = new_figure(9, 2.9)
    lengths = [
        max((len(values[task]) for values in series.values() if task < len(values)), default=0)
        for task in range(len(tasks))
    ]
    starts = [sum(lengths[:task]) for task in range(len(tasks) + 1)]
    for number, values in enumerate(series.values(), start=first):
        colour = PALETTE[f"c{number % COLOURS}"]
        for start, steps in zip(starts, values, strict=False):
            at = [start + step + 0.5 for step in range(len(steps))]
            axis.plot(at, steps, color=colour, alpha=0.3, linewidth=0.8)
            smooth = _moving_mean(steps, max(1, len(steps) // 12))
            axis.plot(at, smooth, color=colour, linewidth=1.8)
    for start in starts[1:-1]:
        axis.axvline(start, color=RULE, linewidth=0.8)
    axis.set_xticks([(a + b) / 2 for a, b in pairwise(starts)], tasks)
    axis.set_xlim(0, max(1, starts[-1]))
    axis.set_ylim(bottom=0)
    axis.set_xlabel("optimizer steps", fontsize=9, color=MUTED)
    _plain(axis, lines=True)
    return figure


def _moving_mean(values: Sequence[float], half: int) -> list[float]:
    """Of what is finite among the `2 half + 1` values around each; NaN where nothing is."""
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    finite = ([value for value in window if math.isfinite(value)] for window in windows)
    return [sum(window) / len(window) if window else math.nan for window in finite]


def bars(groups: Sequence[str], series: Mapping[str, Sequence[float]], first: int = 0) -> Figure:
    """Horizontal bars with signed numbers: for each group one of each series."""
    count = len(series)
    thick = 1 / (count + 0.7)
    figure, [[axis]] = new_figure(7.5, (0.2 * count + 0.14) * len(groups))
    for number, values in enumerate(series.values()):
        at = [row + (number - (count - 1) / 2) * thick for row in range(len(groups))]
        drawn = axis.barh(at, values, 0.85 * thick, color=PALETTE[f"c{(first + number) % COLOURS}"])
        texts = ["" if math.isnan(value) else f"{value:+.3f}" for value in values]
        axis.bar_label(drawn, texts, padding=5, fontsize=9, color=INK)
    axis.axvline(0, color=RULE, linewidth=0.8)
    axis.margins(x=0.1, y=0.02)
    _rows(axis, groups)
    return figure


def stacks(rows: Mapping[str, Mapping[str, float]], unit: str) -> Figure:
    """A horizontal bar for each row, made of phases, with the total behind it."""
    phases = list(dict.fromkeys(phase for row in rows.values() for phase in row))
    figure, [[axis]] = new_figure(7.5, 0.36 * len(rows))
    ends = [0.0] * len(rows)
    longest = max((sum(row.values()) for row in rows.values()), default=1.0)
    for number, phase in enumerate(phases):
        lengths = [row.get(phase, 0.0) for row in rows.values()]
        colour = PALETTE[f"f{number % COLOURS}"]
        drawn = axis.barh(range(len(rows)), lengths, 0.7, left=ends, color=colour, label=phase)
        shown = [f"{value:,.0f}" if value > 0.07 * longest else "" for value in lengths]
        axis.bar_label(drawn, shown, label_type="center", fontsize=9, color="white")
        ends = [end + length for end, length in zip(ends, lengths, strict=True)]
    for row, end in enumerate(ends):
        axis.annotate(f"{end:,.0f} {unit}", (end, row), (6, 0), textcoords="offset points",
                      va="center", fontsize=9, color=INK)  # fmt: skip
    axis.margins(x=0.1)
    axis.set_xlim(left=0)
    _rows(axis, list(rows))
    axis.legend(loc="upper left", bbox_to_anchor=(0, 0), ncols=max(1, len(phases)), frameon=False,
                fontsize=9, labelcolor=MUTED, handlelength=1, handleheight=1)  # fmt: skip
    return figure


def _rows(axis: Axes, names: Sequence[str]) -> None:
    """Bars from the top down with their names, and no numbers along them."""
    axis.invert_yaxis()
    _plain(axis)
    axis.set_yticks(range(len(names)), names, color=INK)
    axis.set_xticks([])


def spectra(lines: Sequence[tuple[Sequence[float], float]], cut: float) -> Figure:
    """Singular or eigenvalues over the largest, log scale, of some matrices; the cut is dashed.

    lines: shares of the largest at even places of the spectrum, and the depth of the layer, in
        [0, 1].
    """
    figure, [[axis]] = new_figure(2.5, 1.6)
    for values, depth in lines:
        at = [place / max(1, len(values) - 1) for place in range(len(values))]
        shown = [max(value, 1e-6) for value in values]
        # Between the colours of the first and the last layer.
        for colour, share in ((PALETTE["c1"], 1 - depth), (PALETTE["c0"], depth)):
            axis.plot(at, shown, color=colour, linewidth=0.9, alpha=0.8 * share)
    axis.axvline(cut, color=BAD, linestyle="--", linewidth=1.1)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.minorticks_off()
    axis.set_xticks([0, 0.5, 1], ["0", "½", "1"])
    axis.set_xlim(0, 1)
    _plain(axis, lines=True)
    return figure
