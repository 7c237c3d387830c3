"""The table of one file of `bench.subspaces`, as Markdown."""

from __future__ import annotations

from typing import Any


def subspaces(name: str, content: dict[str, Any]) -> str:
    about = content["about"]
    lines = [
        f"### Subspaces, {about['device']}, {about['threads']} threads",
        "",
        f"`results/{name}`: torch {about['torch']}, {about['date']}. Speed-ups are over "
        "`torch.linalg.svd` of the same float32 matrix, medians over rounds in which the methods "
        "take turns; `lost` is 1 - energy over the optimum, `angle` 1 - mean squared cosine.",
        "",
        "| matrix | t/k | method | seconds | speed-up | lost | angle | defect |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in content["rows"]:
        cells = [row["matrix"], f"{row['trainable']:g}", row["method"], f"{row['seconds']:.3g}"]
        cells.append(f"{row['speedup']:.2f}x")
        losses = (1 - row.get(key, 1.0) for key in ("energy", "cosine"))
        # Below float64's rounding of the figures themselves there is nothing to tell.
        cells += [f"{max(loss, 0.0):.0e}" for loss in losses]
        cells.append(f"{row['defect']:.0e}" if "defect" in row else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
