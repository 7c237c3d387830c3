"""Native kernels against torch on a CPU, in one run.

    OMP_NUM_THREADS=2 python -m bench.native --out bench/results

`chain` is what one would write without this package: the best lines of torch for the projection,
then `torch.optim.AdamW(fused=True)`; it projects the gradient in place. `torch` and `native` are
the two backends of one function. Ratios are medians over rounds of the ratio within a round, to
`chain` or to `torch stochastic`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from bench.cases import ADAMW, Case, Inputs, Variants, variants
from bench.cpu import machine
from bench.timing import interleaved
from sculpt_kernels import expand_add_, native, project_adamw_

# Small ones first: after large matrices the allocator hands out pages that are not there yet.
SHAPES = [(1536, 576), (4096, 4096)]
RATIOS = ["1/32", "1/8", "1/2"]
BACKENDS = ("torch", "native")


def adamw(data: Inputs) -> Variants:
    state = (data.W, data.G, data.exp_avg, data.exp_avg_sq)
    found = {"chain": variants(data)["chain"]}
    for project in ("gradient", "update"):
        for backend in BACKENDS:
            found[f"{backend} {project}"] = lambda p=project, b=backend: project_adamw_(
                *state, data.U, data.V, project=p, copy=data.low, backend=b, **ADAMW
            )
    return found


def expand_add(data: Inputs) -> Variants:
    found: Variants = {}
    for rounding, seed in (("stochastic", 1), ("nearest", None)):
        for backend in BACKENDS:
            found[f"{backend} {rounding}"] = lambda b=backend, r=rounding, s=seed: expand_add_(
                data.G, data.C, data.U, data.V, alpha=0.5, rounding=r, seed=s, backend=b
            )
    return found


def _shape(text: str) -> tuple[int, int]:
    m, n = map(int, text.split("x"))
    return m, n


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown, one table per operation: the yardstick's milliseconds, and ratios to it."""
    parts = []
    for operation in dict.fromkeys(row["case"].split()[0] for row in rows):
        chosen = [row for row in rows if row["case"].split()[0] == operation]
        against = chosen[0]["against"]
        others = [name for name in chosen[0]["variants"] if name != against]
        lines = [
            f"| `{operation}`, rank / short side | {against}, ms | {' | '.join(others)} |",
            "| --- |" + " ---: |" * (1 + len(others)),
        ]
        for row in chosen:
            cells = [f"{row['variants'][against]['ms']:.1f}"]
            cells += [f"{row['variants'][name]['ratio']:.2f}" for name in others]
            lines.append(f"| {row['case'].partition(' ')[2]} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return parts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=_shape, default=SHAPES, help="MxN ...")
    parser.add_argument("--ratios", nargs="+", default=RATIOS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0, help="per case, after three rounds")
    parser.add_argument("--out", type=Path, help="folder for the results")
    options = parser.parse_args(arguments)
    rows = []
    for shape in options.shapes:
        for operation, dtype, make in (
            ("expand_add", "bfloat16", expand_add),
            ("adamw", "float32", adamw),
            ("adamw", "bfloat16", adamw),
        ):
            for ratio in options.ratios:
                case = Case(operation, "core", shape, ratio, dtype)
                data = Inputs(case, torch.device("cpu"), seed=0)
                against = "torch stochastic" if operation == "expand_add" else "chain"
                found = interleaved(
                    [make(data)], torch.device("cpu"), against=against,
                    rounds=options.rounds, seconds=options.seconds,
                )  # fmt: skip
                cells = {
                    name: {"ms": 1e3 * t.median, "p20": 1e3 * t.p20, "p80": 1e3 * t.p80,
                           "ratio": t.ratio, "rounds": t.rounds}
                    for name, t in found.items()
                }  # fmt: skip
                rows.append({"case": case.name, "rank": case.rank, "against": against,
                             "variants": cells})  # fmt: skip
                texts = (f"{k} {v['ms']:.2f} ms ({v['ratio']:.2f}x)" for k, v in cells.items())
                print(f"{case.name:32} " + "  ".join(texts), flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"native-{torch.get_num_threads()}t.json"
        about = machine() | {"isa": native.library().isa, "date": time.strftime("%Y-%m-%d")}
        path.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
