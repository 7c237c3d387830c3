"""Charts of what earlier tasks use, and of what each layer gave up of it, by kind and depth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sculpt.certificate.leak import Certificate
from sculpt.curvature.directions import eigenvalues
from sculpt.curvature.factors import Factor
from sculpt.curvature.memory import FILE, Memory
from sculpt.report import charts
from sculpt.report.charts import as_svg, place_of
from sculpt.task.table import TaskRow

POINTS = 48
"""Eigenvalues that a curve shows."""


def sections(
    rows: list[TaskRow], certificates: list[Certificate], model: Path, run: str
) -> dict[str, Any]:
    """Of the last task, where its subspaces come from curvature; nothing otherwise.

    Args:
        rows: the matrices of the last task, and certificates of all tasks.
        model: directory of the saved model, with the memory or without.
    """
    given_up = {row.name: 1 - row.energy for row in rows if row.method.startswith("curvature")}
    if not given_up:
        return {}
    moved: dict[str, float] = {}
    for row in (row for certificate in certificates for row in certificate.rows):
        if math.isfinite(row.outputs):  # Otherwise no protected row had reached it.
            moved[row.name] = max(moved.get(row.name, 0.0), row.outputs)
    found: dict[str, Any] = {"given_up": _cells(given_up, f"curvature given up in {run}")}
    if moved:
        found["moved"] = _cells(moved, f"outputs moved in {run}")
    if (model / FILE).is_file():
        memory = Memory.read(model / FILE, torch.device("cpu"))
        found["pictures"] = _pictures(memory, [row for row in rows if memory.of(row.name)])
    return found


def _cells(values: Mapping[str, float], label: str) -> dict[str, Any]:
    """Shares of the largest of them."""
    most = max(values.values()) or 1.0
    shares = {name: value / most for name, value in values.items()}
    return {"most": most, "svg": as_svg(charts.layers({"": shares}), label)}


def _pictures(memory: Memory, rows: list[TaskRow]) -> list[dict[str, Any]]:
    """Spectra of both factors of each kind of matrix, a line for each layer."""
    kinds: dict[str, list[TaskRow]] = {}
    for row in rows:
        kinds.setdefault(place_of(row.name)[0], []).append(row)
    curves: dict[str, list[float]] = {}
    pictures = []
    for kind, members in kinds.items():
        last = max(1, max(place_of(row.name)[1] for row in members))
        for side, axis in (("left", -2), ("right", -1)):
            lines = []
            for row in members:
                key = getattr(memory.sides[row.name], side)
                if key not in curves:
                    curves[key] = _curve(memory.factors[key])
                lines.append((curves[key], place_of(row.name)[1] / last))
            size = members[0].shape[axis]
            t = min(members[0].shape[-2:]) - members[0].preserved
            picture = charts.spectra(lines, 1 - t / size)
            said = "inputs" if memory.sides[members[0].name].reads == side else "output gradients"
            svg = as_svg(picture, f"{said} of {kind}")
            pictures.append({"kind": kind, "of": said, "size": size, "svg": svg})
    return pictures


def _curve(factor: Factor) -> list[float]:
    """Eigenvalues over the largest, at even places from the largest to the smallest."""
    values = eigenvalues(factor).flip(0)
    at = torch.linspace(0, len(values) - 1, min(POINTS, len(values))).round().long()
    shares: list[float] = (values[at] / values[0].clamp_min(1e-300)).tolist()
    return shares
