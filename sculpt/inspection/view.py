"""An inspection as tables for people."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from io import StringIO
from typing import TYPE_CHECKING

from sculpt.inspection.cost import Cost

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from sculpt.inspection.result import Inspection, Method, Row

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def quantity(value: float | None, unit: str = "B") -> str:
    """`22.4 GB`; a dash for nothing."""
    if value is None:
        return "?"
    if value == 0:
        return "–"
    if value >= 1e15:
        return f"{value / 1e15:,.3g} P{unit}"
    for size, name in UNITS:
        if value >= size:
            return f"{value / size:.3g} {name}{unit}"
    return f"{value:.0f} {unit}"


def views(found: Inspection, *, every_matrix: bool = False) -> Iterator[RenderableType]:
    """Header, the methods side by side, the matrices, and what was left out."""
    yield _header(found)
    yield _methods(found)
    yield _matrices(found, every_matrix)
    if any(row.spectrum for row in found.rows):
        yield _spectra(found, every_matrix)
    yield _footer(found)


def _header(found: Inspection) -> RenderableType:
    from rich.text import Text

    setting = found.setting
    passes = f" in {setting.micro_batches} passes" if setting.micro_batches > 1 else ""
    activations = "recomputed in the backward" if setting.checkpointing else "kept"
    states = (
        f"an optimizer of {setting.states} states in {_state_words(setting.state_dtype)}"
        if setting.states
        else "a stateless optimizer"
    )
    parameters = quantity(found.parameters, "").strip()
    text = Text()
    text.append(found.model, style="bold")
    text.append(
        f"  {found.kind}, {parameters} parameters in {setting.dtype}, "
        f"{len(found.rows)} matrices, {found.trained}\n"
    )
    text.append(
        f"one step: {setting.tokens:,} tokens in sequences of {setting.sequence:,}{passes}, "
        f"activations {activations}, {states}",
        style="dim",
    )
    return text


def _state_words(dtype: str) -> str:
    return "the dtype of what trains" if dtype == "trained" else dtype


def _methods(found: Inspection) -> RenderableType:
    table = _table("", *(method.label for method in found.methods.values()))
    table.columns[1 + list(found.methods).index("sculpt")].style = "bold"
    methods = list(found.methods.values())

    def add(
        label: str, value: Callable[[Method], str], *, style: str = "", last: bool = False
    ) -> None:
        table.add_row(label, *map(value, methods), style=style, end_section=last)

    add("trainable elements", lambda m: quantity(m.cost.trainable, "").strip(), last=True)
    for label, attribute in (
        ("weights", "weights"),
        ("frozen beside them", "bases"),
        ("trained beside them", "factors"),
        ("copies", "copies"),
        ("gradients", "gradients"),
        ("optimizer states", "optimizer"),
    ):
        if any(getattr(m.cost, attribute) for m in methods):
            add(label, lambda m, a=attribute: quantity(getattr(m.cost, a)))  # type: ignore[misc]
    add("held", lambda m: quantity(m.cost.held))
    add("activations of a pass", lambda m: quantity(m.activations))
    add("peak memory", lambda m: quantity(m.peak))
    plain = found.methods["plain"]
    add("  of plain", lambda m: _times(m.peak, plain.peak), style="dim")
    if any(m.cost.host for m in methods):
        add("host memory", lambda m: quantity(m.cost.host))
    table.add_section()
    recomputed = ", nothing recomputed" if found.setting.checkpointing else ""
    counted = plain.flops is not None
    add(
        f"FLOPs of the matrices{recomputed}",
        lambda m: quantity(m.cost.flops if counted else None, "FLOP"),
    )
    add("  of plain", lambda m: _times(m.cost.flops, plain.cost.flops), style="dim")
    add("FLOPs of a whole step", lambda m: quantity(m.flops, "FLOP"))
    add("  of plain", lambda m: _times(m.flops, plain.flops), style="dim")
    return table


def _times(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}x" if value and base else "?"


def _groups(found: Inspection, every: bool) -> dict[str, list[Row]]:
    """Matrices of one kind together: of one name but for numbers, one shape and one rank."""
    groups: dict[str, list[Row]] = {}
    for row in found.rows:
        matrix = row.matrix
        name = matrix.name if every else re.sub(r"\.\d+(?=\.|$)", ".*", matrix.name)
        clash = groups.get(name)
        if clash and (clash[0].matrix.shape, clash[0].matrix.preserved) != (
            matrix.shape,
            matrix.preserved,
        ):
            name = matrix.name
        groups.setdefault(name, []).append(row)
    return groups


def _table(*titles: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, title in enumerate(titles):
        table.add_column(title, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _matrices(found: Inspection, every: bool) -> RenderableType:
    groups = _groups(found, every)
    prefix = _common_prefix(list(groups))
    counted = found.methods["plain"].flops is not None
    titles = ["", "shape", "preserved", "trainable", "elements", "held", "of plain"]
    table = _table(f"{prefix}…", *titles, *(["FLOPs of plain"] if counted else []))
    for name, rows in groups.items():
        matrix = rows[0].matrix
        many = len(rows) * matrix.count
        table.add_row(
            name.removeprefix(prefix),
            "" if many == 1 else f"×{many}",
            " x ".join(map(str, matrix.shape)),
            str(matrix.preserved),
            str(matrix.trainable_rank),
            *_costs(rows, counted),
        )
    table.add_section()
    total = str(sum(row.matrix.count for row in found.rows))
    table.add_row("all", total, "", "", "", *_costs(found.rows, counted), style="bold")
    return table


def _spectra(found: Inspection, every: bool) -> RenderableType:
    groups = _groups(found, every)
    prefix = _common_prefix(list(groups))
    titles = ["energy preserved", "stable rank", "σ₁", "σ at the cut", "last σ", "σ₁ to last"]
    table = _table(f"{prefix}…", *titles)
    for name, rows in groups.items():
        spectra = [row.spectrum for row in rows if row.spectrum]
        if spectra:
            energies = [spectrum.energy for spectrum in spectra]
            low, high = min(energies), max(energies)
            middle = sorted(spectra, key=lambda s: s.energy)[len(spectra) // 2]
            table.add_row(
                name.removeprefix(prefix),
                f"{low:.1%}" if len(spectra) == 1 else f"{low:.1%} to {high:.1%}",
                f"{middle.stable_rank:.1f}",
                f"{middle.largest:.3g}",
                f"{middle.at_cut:.3g}",
                f"{middle.smallest:.3g}",
                middle.bars(),
            )
    return table


def _common_prefix(names: list[str]) -> str:
    parts: list[str] = []
    for level in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(level)) > 1:
            break
        parts.append(level[0])
    return ".".join(parts) + "." if parts else ""


def _costs(rows: list[Row], counted: bool) -> list[str]:
    ours = sum((row.costs["sculpt"] for row in rows), Cost())
    plain = sum((row.costs["plain"] for row in rows), Cost())
    found = [
        quantity(ours.trainable, "").strip(),
        quantity(ours.held),
        _times(ours.held, plain.held),
    ]
    return [*found, _times(ours.flops, plain.flops)] if counted else found


def _footer(found: Inspection) -> RenderableType:
    from rich.text import Text

    text = Text(style="dim")
    reasons: dict[str, int] = {}
    for reason in found.left_out.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    parts = [f"{count} {reason}" for reason, count in reasons.items()]
    if parts:
        text.append(f"left out: {'; '.join(parts)}\n")
    for note in found.notes:
        text.append(f"note: {note}\n")
    return text


def as_text(found: Inspection, *, width: int = 120) -> str:
    from rich.console import Console

    buffer = StringIO()
    console = Console(file=buffer, width=width, color_system=None, highlight=False, markup=False)
    for view in views(found):
        console.print(view)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())
