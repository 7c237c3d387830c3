"""What an inspection found, and how it is shown: as tables and as JSON."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from sculpt.inspection.spectra import Spectrum
from sculpt.inspection.statistics import Statistics
from sculpt.messages import text_table
from sculpt.task.cost import Cost, Matrix

LORA_RANK = 32
UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
PARTS = (
    ("weights", "weights"),
    ("frozen beside them", "bases"),
    ("trained beside them", "factors"),
    ("copies", "copies"),
    ("gradients", "gradients"),
    ("optimizer states", "optimizer"),
)


@dataclass(frozen=True)
class Setting:
    """What is trained with, for all methods alike.

    Attributes:
        tokens: in one optimizer step; sequence: tokens of one sequence.
        micro_batches: passes that a step accumulates.
        checkpointing: whether activations are recomputed in the backward.
        dtype: of the weights; state_dtype: of AdamW's two states.
    """

    tokens: int
    sequence: int
    micro_batches: int
    checkpointing: bool
    dtype: str
    state_dtype: str

    @property
    def batch(self) -> int:
        """Sequences in one pass."""
        return self.tokens // (self.micro_batches * self.sequence)


@dataclass(frozen=True)
class Method:
    """One way to train the model.

    Attributes:
        cost: of all matrices, and the bytes of all other weights.
        activations: bytes that a forward pass leaves for the backward.
        peak: bytes on the device at the worst moment of a step: what is held all the time, and what
            is alive in the pass.
        flops: of one step, attention, head and all others included.

    The last three are None where no pass was traced, as for LoRA and OSF.
    """

    label: str
    cost: Cost
    activations: int | None = None
    peak: int | None = None
    flops: int | None = None


@dataclass(frozen=True)
class Row:
    """One matrix: what it is, and its cost by each method."""

    matrix: Matrix
    costs: dict[str, Cost]
    spectrum: Spectrum | None


@dataclass(frozen=True)
class Inspection:
    """Cost of training a model by several methods; `str()` is a table.

    Attributes:
        model, kind: name and class; parameters: number of elements.
        trained: how it is sculpted, in words.
        methods: by name: `"plain"`, `"sculpt"`, `"lora"`, `"osf"`.
        rows: one for each matrix that is sculpted.
        statistics: what protecting a task takes; None where nothing was traced or is protected.
        left_out: parameters that are not, with the reason.
        notes: what could not be found out, and why.
    """

    model: str
    kind: str
    parameters: int
    trained: str
    setting: Setting
    methods: dict[str, Method]
    rows: list[Row]
    statistics: Statistics | None
    left_out: dict[str, str]
    notes: list[str]

    def __str__(self) -> str:
        return self.text()

    def text(self, *, every_matrix: bool = False) -> str:
        """Header, the methods side by side, the matrices, and what was left out.

        every_matrix: a line for every matrix, not for every kind.
        """
        groups = _groups(self.rows, every_matrix)
        parts = [_header(self), _methods(self), _matrices(self, groups)]
        if any(row.spectrum for row in self.rows):
            parts.append(_spectra(groups))
        if self.statistics is not None:
            parts.append(_statistics(self, self.statistics))
        return "\n".join([*parts, _footer(self)])

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON would have it."""
        found = asdict(self)
        for name, method in self.methods.items():
            found["methods"][name]["cost"] |= {"held": method.cost.held}
            found["methods"][name]["matrix_flops"] = method.cost.flops
        return found


def quantity(value: float, unit: str = "B") -> str:
    """`22.4 GB`; a dash for nothing."""
    if value == 0:
        return "–"
    for size, name in UNITS:
        if value >= size:
            return f"{value / size:,.3g} {name}{unit}".rstrip()
    return f"{value:.0f} {unit}".rstrip()


def _statistics(found: Inspection, of: Statistics) -> str:
    step = found.methods["plain"].flops or 1
    flops = of.flops * found.setting.micro_batches
    kinds = f"{of.factors} factors" + (f", {of.sketches} of them sketches" if of.sketches else "")
    return (
        f"to protect a task: statistics of {quantity(of.bytes)} ({kinds}), peak memory of the pass "
        f"{quantity(of.peak)};\nfor each {found.setting.tokens:,} tokens {flops / step:.2f} of a "
        f"plain step's FLOPs, and once a task {of.choice / step:.1f} to choose directions, in "
        "float64\n"
    )


def _times(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}x" if value and base else ""


def _header(found: Inspection) -> str:
    setting = found.setting
    passes = f" in {setting.micro_batches} passes" if setting.micro_batches > 1 else ""
    activations = "recomputed in the backward" if setting.checkpointing else "kept"
    states = "the dtype of what trains" if setting.state_dtype == "trained" else setting.state_dtype
    return (
        f"{found.model}: {found.kind}, {quantity(found.parameters, '')} parameters in "
        f"{setting.dtype}, {len(found.rows)} matrices\n"
        f"sculpted: {found.trained}\n"
        f"one step: {setting.tokens:,} tokens in sequences of {setting.sequence:,}{passes}, "
        f"activations {activations}, AdamW's states in {states}"
    )


def _methods(found: Inspection) -> str:
    methods, plain = list(found.methods.values()), found.methods["plain"]
    rows: list[list[str]] = []

    def add(
        label: str, value: Callable[[Method], float | None], unit: str = "B", *, of: bool = False
    ) -> None:
        values = [value(method) for method in methods]
        rows.append([label, *("" if v is None else quantity(v, unit) for v in values)])
        if of:
            rows.append(["  of plain", *(_times(v, value(plain)) for v in values)])

    add("trainable elements", lambda method: method.cost.trainable, "")
    for label, part in PARTS:
        if any(getattr(method.cost, part) for method in methods):
            add(label, lambda method, part=part: getattr(method.cost, part))  # type: ignore[misc]
    add("held", lambda method: method.cost.held, of=True)
    if any(method.cost.host for method in methods):
        add("host memory", lambda method: method.cost.host)
    if plain.flops is not None:
        add("activations of a pass", lambda method: method.activations)
        add("peak memory", lambda method: method.peak, of=True)
        recomputed = ", nothing recomputed" if found.setting.checkpointing else ""
        add(f"FLOPs of the matrices{recomputed}", lambda m: m.cost.flops, "FLOP", of=True)
        add("FLOPs of a whole step", lambda method: method.flops, "FLOP", of=True)
    return text_table(["", *(method.label for method in methods)], rows)


def _groups(rows: list[Row], every: bool) -> dict[str, list[Row]]:
    """Matrices of one kind together: of one name but for numbers, one shape and one rank."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        matrix = row.matrix
        name = matrix.name if every else re.sub(r"\.\d+(?=\.|$)", ".*", matrix.name)
        alike = (matrix.shape, matrix.preserved)
        clash = groups.get(name)
        if clash and (clash[0].matrix.shape, clash[0].matrix.preserved) != alike:
            name = matrix.name
        groups.setdefault(name, []).append(row)
    return groups


def _common_prefix(names: list[str]) -> str:
    parts: list[str] = []
    for level in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(level)) > 1:
            break
        parts.append(level[0])
    return ".".join(parts) + "." if parts else ""


def _matrices(found: Inspection, groups: dict[str, list[Row]]) -> str:
    prefix = _common_prefix(list(groups))
    counted = found.methods["plain"].flops is not None

    def costs(rows: list[Row]) -> list[str]:
        ours, plain = (sum((r.costs[m] for r in rows), Cost()) for m in ("sculpt", "plain"))
        shown = [quantity(ours.trainable, ""), quantity(ours.held), _times(ours.held, plain.held)]
        return [*shown, _times(ours.flops, plain.flops)] if counted else shown

    lines = []
    for name, rows in groups.items():
        matrix = rows[0].matrix
        count = len(rows) * matrix.count
        shape = " x ".join(map(str, matrix.shape))
        ranks = str(matrix.preserved), str(matrix.trainable_rank)
        many = "" if count == 1 else f"×{count}"
        lines.append([name.removeprefix(prefix), many, shape, *ranks, *costs(rows)])
    total = str(sum(row.matrix.count for row in found.rows))
    lines.append(["all", total, "", "", "", *costs(found.rows)])
    titles = ["", "shape", "preserved", "trainable", "elements", "held", "of plain"]
    return text_table([f"{prefix}…", *titles, *(["FLOPs of plain"] if counted else [])], lines)


def _spectra(groups: dict[str, list[Row]]) -> str:
    prefix = _common_prefix(list(groups))
    lines = []
    for name, rows in groups.items():
        spectra = sorted((r.spectrum for r in rows if r.spectrum), key=lambda s: s.energy)
        if spectra:
            low, middle, high = spectra[0], spectra[len(spectra) // 2], spectra[-1]
            energy = f"{low.energy:.1%}" + (f" to {high.energy:.1%}" if len(spectra) > 1 else "")
            values = (f"{v:.3g}" for v in (middle.largest, middle.at_cut, middle.smallest))
            stable = f"{middle.stable_rank:.1f}"
            lines.append([name.removeprefix(prefix), energy, stable, *values, middle.bars()])
    titles = ["energy preserved", "stable rank", "σ₁", "σ at the cut", "last σ", "σ₁ to last"]
    return text_table([f"{prefix}…", *titles], lines)


def _footer(found: Inspection) -> str:
    reasons: dict[str, int] = {}
    for reason in found.left_out.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    parts = [f"{count} {reason}" for reason, count in reasons.items()]
    lines = [f"left out: {'; '.join(parts)}"] if parts else []
    return "\n".join([*lines, *(f"note: {note}" for note in found.notes)])
