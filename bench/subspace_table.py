"""The tables of one file of `bench.subspaces`, as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]

BASELINE = "torch.linalg.svd"
# Where the cut divides equal singular values, any directions among them are as good as others.
AMBIGUOUS = ("rank", "repeated")


def subspaces(name: str, content: dict[str, Any]) -> str:
    about, rows = content["about"], content["rows"]
    lines = [
        f"### Subspaces, {about['device']}, {about['threads']} threads",
        "",
        f"`results/{name}`: torch {about['torch']}, {about['date']}. Seconds of `{BASELINE}` of "
        "the float32 matrix, and how many times faster each method is: medians over rounds in "
        "which the methods take turns.",
        "",
        *_grid(rows, _seconds),
        "",
    ]
    if any("energy" in row for row in rows):
        lines += ["Energy lost: 1 - what is captured over the optimum.", ""]
        lines += [*_grid(rows, _lost), "", *_worst(rows), ""]
    return "\n".join(lines).rstrip()


def _grid(rows: list[Row], cell: Callable[[Row], str]) -> list[str]:
    """One line per matrix and share, one column per method."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    found = {(row["matrix"], row["trainable"], row["method"]): row for row in rows}
    lines = [
        f"| matrix | t/k | {' | '.join(methods)} |",
        f"| --- | ---: |{' ---: |' * len(methods)}",
    ]
    for matrix, share in dict.fromkeys((row["matrix"], row["trainable"]) for row in rows):
        cells = [found.get((matrix, share, method)) for method in methods]
        texts = ["" if row is None else cell(row) for row in cells]
        lines.append(f"| {matrix} | {share:g} | {' | '.join(texts)} |")
    return lines


def _seconds(row: Row) -> str:
    if row["method"] == BASELINE:
        return f"{row['seconds']:.3g} s"
    return f"{row['speedup']:.2f}x"


def _lost(row: Row) -> str:
    # Below float64's rounding of the figures themselves there is nothing to tell.
    return f"{max(1 - row['energy'], 0.0):.0e}" if "energy" in row else ""


def _worst(rows: list[Row]) -> list[str]:
    """The largest angle and defect of each method."""
    lines = [
        "The worst of all matrices: angle, 1 - mean squared cosine with the exact span, where the "
        "cut divides no equal singular values; defect, the largest entry of `QᵀQ - I`.",
        "",
        "| method | angle | defect |",
        "| --- | ---: | ---: |",
    ]
    for method in dict.fromkeys(row["method"] for row in rows if "defect" in row):
        mine = [row for row in rows if row["method"] == method]
        told = [row for row in mine if not row["matrix"].endswith(AMBIGUOUS)]
        angle = max((max(1 - row["cosine"], 0.0) for row in told), default=None)
        defect = max(row["defect"] for row in mine)
        lines.append(f"| {method} | {'' if angle is None else f'{angle:.0e}'} | {defect:.0e} |")
    return lines
