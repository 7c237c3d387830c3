"""Charts as inline SVG, coloured by the style sheet of the page so that light and dark both work.

Series and phases are told apart by the classes `s0`, `s1`, ...; see `report.html.j2`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 760, 52, 14, 14, 40
COLOURS = 6


def curves(
    series: Mapping[str, Sequence[Sequence[float]]],
    tasks: Sequence[str],
    label: str,
    first: int = 0,
) -> str:
    """One line for each series, task after task along one axis; pale: every step.

    first: number of the first colour.
    """
    height = 280
    longest = [
        max((len(values[i]) for values in series.values() if i < len(values)), default=0)
        for i in range(len(tasks))
    ]
    starts = [sum(longest[:i]) for i in range(len(tasks) + 1)]
    finite = [v for s in series.values() for t in s for v in t if math.isfinite(v)]
    top = _nice(max(finite, default=1.0))
    x = _scale(0, max(1, starts[-1]), LEFT, WIDTH - RIGHT)
    y = _scale(0, top, height - BOTTOM, TOP)
    parts = [_y_axis([top * i / 4 for i in range(5)], y)]
    for index, task in enumerate(tasks):
        middle = (x(starts[index]) + x(starts[index + 1])) / 2
        parts.append(_text(middle, height - 22, task, "tick middle"))
        if index:
            parts.append(_line(x(starts[index]), TOP, x(starts[index]), height - BOTTOM, "grid"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 5, "optimizer steps", "axis middle"))
    for number, values in enumerate(series.values(), start=first):
        for start, losses in zip(starts, values, strict=False):
            losses = [value if math.isfinite(value) else top for value in losses]
            at = [start + step + 0.5 for step in range(len(losses))]
            parts.append(
                _path([(x(a), y(v)) for a, v in zip(at, losses, strict=True)], number, "raw")
            )
            smooth = _moving_mean(losses, max(1, len(losses) // 12))
            points = [(x(a), y(v)) for a, v in zip(at, smooth, strict=True)]
            parts.append(_path(points, number, "line"))
    return _svg(WIDTH, height, label, parts)


def spectrum(lines: Sequence[tuple[Sequence[float], float]], cut: float, label: str) -> str:
    """Singular values over the largest, log scale, of a group of matrices; the cut is dashed.

    lines: shares `σ_i / σ_1` at even places of the spectrum, and the depth of the layer in [0, 1].
    """
    width, height, left, bottom = 300, 190, 40, 30
    low = math.floor(min((math.log10(max(v, 1e-6)) for line, _ in lines for v in line), default=-1))
    x = _scale(0, 1, left, width - 10)
    y = _scale(low, 0, height - bottom, 10)
    parts = []
    for power in range(low, 1):
        parts.append(_line(left, y(power), width - 10, y(power), "grid"))
        parts.append(_text(left - 6, y(power) + 4, f"1e{power}" if power else "1", "tick end"))
    for place, name in ((0, "0"), (0.5, "k/2"), (1, "k")):
        parts.append(_text(x(place), height - 12, name, "tick middle"))
    for values, depth in lines:
        count = max(1, len(values) - 1)
        points = [(x(i / count), y(math.log10(max(v, 1e-6)))) for i, v in enumerate(values)]
        parts.append(f'<path class="spectrum" style="--depth:{depth:.3f}" d="{_d(points)}"/>')
    parts.append(_line(x(cut), 10, x(cut), height - bottom, "cut"))
    return _svg(width, height, label, parts)


def bars(
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    label: str,
    *,
    signed: bool,
    first: int = 0,
) -> str:
    """Horizontal bars: for each group one bar of each series, with its number."""
    thick, gap, left = 15, 14, 170
    block = thick * len(series) + gap
    height = TOP + block * len(groups) + 8
    finite = [v for values in series.values() for v in values if math.isfinite(v)]
    low = min(0.0, *finite) if signed and finite else 0.0
    high = max([0.0, *finite]) or 1.0
    x = _scale(low, high, left, WIDTH - 70)
    parts = [_line(x(0), TOP - 4, x(0), height - 8, "grid")]
    for row, group in enumerate(groups):
        top = TOP + row * block
        middle = top + thick * len(series) / 2 + 4
        parts.append(_text(left - 10, middle, group, "name end"))
        for number, values in enumerate(series.values()):
            value = values[row]
            if not math.isfinite(value):
                continue
            at = top + number * thick
            begin, end = sorted((x(0), x(value)))
            parts.append(
                f'<rect class="s{(first + number) % COLOURS}" x="{begin:.1f}" y="{at + 1}" '
                f'width="{max(end - begin, 1):.1f}" height="{thick - 2}" rx="2"/>'
            )
            text = f"{value:+.3f}" if signed else f"{value:.3f}"
            parts.append(_text(max(end, x(0)) + 6, at + thick - 3, text, "number"))
    return _svg(WIDTH, height, label, parts)


def stacks(rows: Mapping[str, Mapping[str, float]], label: str, unit: str) -> str:
    """One horizontal bar for each row, made of phases, with the total behind it."""
    phases = list(dict.fromkeys(phase for row in rows.values() for phase in row))
    thick, left = 26, 170
    height = TOP + (thick + 12) * len(rows) + 34
    longest = max((sum(row.values()) for row in rows.values()), default=1.0) or 1.0
    x = _scale(0, longest, left, WIDTH - 90)
    parts = []
    for index, (name, row) in enumerate(rows.items()):
        top, at = TOP + index * (thick + 12), 0.0
        parts.append(_text(left - 10, top + thick / 2 + 5, name, "name end"))
        for phase, value in row.items():
            width = x(at + value) - x(at)
            tip = escape(f"{phase}: {value:,.1f} {unit}")
            parts.append(
                f'<rect class="p{phases.index(phase) % COLOURS}" x="{x(at):.1f}" y="{top}" '
                f'width="{width:.1f}" height="{thick}"><title>{tip}</title></rect>'
            )
            if width > 52:
                parts.append(
                    _text(x(at) + width / 2, top + thick / 2 + 5, f"{value:,.0f}", "inside middle")
                )
            at += value
        parts.append(_text(x(at) + 8, top + thick / 2 + 5, f"{at:,.0f} {unit}", "number"))
    offset = float(left)
    for number, phase in enumerate(phases):
        parts.append(
            f'<rect class="p{number % COLOURS}" x="{offset}" y="{height - 20}" '
            'width="11" height="11"/>'
        )
        parts.append(_text(offset + 16, height - 10, phase, "tick"))
        offset += 34 + 7.0 * len(phase)
    return _svg(WIDTH, height, label, parts)


def _svg(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


class _scale:
    """The linear map of `[a, b]` to `[c, d]`."""

    def __init__(self, a: float, b: float, c: float, d: float) -> None:
        self.a, self.c = a, c
        self.factor = (d - c) / (b - a) if b != a else 0.0

    def __call__(self, value: float) -> float:
        return self.c + (value - self.a) * self.factor


def _y_axis(values: Sequence[float], y: _scale) -> str:
    return "".join(
        _line(LEFT, y(v), WIDTH - RIGHT, y(v), "grid")
        + _text(LEFT - 8, y(v) + 4, f"{v:g}", "tick end")
        for v in values
    )


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _path(points: Points, number: int, kind: str) -> str:
    return f'<path class="{kind} s{number % COLOURS}" d="{_d(points)}"/>' if points else ""


def _d(points: Points) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _moving_mean(values: Sequence[float], half: int) -> list[float]:
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _nice(value: float) -> float:
    """The next of 1, 2, 4, 6, 8, 10 times a power of ten."""
    if not 0 < value < math.inf:
        return 1.0
    power: float = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 6, 8, 10) if step * power >= value * 0.999)
