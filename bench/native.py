"""Native kernels against torch on a CPU, in one run.

    OMP_NUM_THREADS=2 python -m bench.native --out bench/results

Weights are updated with stochastic rounding by both backends, and rounded to nearest, which torch
does in any case. Ratios are medians over rounds of the ratio within a round, to the first.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case, Inputs, Variants
from bench.cpu import machine
from bench.timing import interleaved
from sculpt_kernels import expand_add_, native

# Small ones first: after large matrices the allocator hands out pages that are not there yet.
SHAPES = [(1536, 576), (4096, 4096)]
RATIOS = ["1/32", "1/8", "1/2"]
AGAINST = "torch stochastic"


def calls(data: Inputs) -> Variants:
    def call(backend: str, **options: Any) -> Callable[[], object]:
        return lambda: expand_add_(
            data.G, data.C, data.U, data.V, alpha=0.5, backend=backend, **options
        )

    stochastic = {"rounding": "stochastic", "seed": 1}
    return {
        AGAINST: call("torch", **stochastic),
        "native stochastic": call("native", **stochastic),
        "nearest": call("torch"),
    }


def _shape(text: str) -> tuple[int, int]:
    m, n = map(int, text.split("x"))
    return m, n


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: the yardstick's milliseconds, and ratios to it."""
    others = [name for name in rows[0]["variants"] if name != AGAINST]
    lines = [
        f"| `expand_add_`, rank / short side | {AGAINST}, ms | {' | '.join(others)} |",
        "| --- |" + " ---: |" * (1 + len(others)),
    ]
    for row in rows:
        cells = [f"{row['variants'][AGAINST]['ms']:.1f}"]
        cells += [f"{row['variants'][name]['ratio']:.2f}" for name in others]
        lines.append(f"| {row['case'].partition(' ')[2]} | {' | '.join(cells)} |")
    return ["\n".join(lines)]


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
        for ratio in options.ratios:
            case = Case("expand_add", "core", shape, ratio, "bfloat16")
            data = Inputs(case, torch.device("cpu"), seed=0)
            found = interleaved(
                [calls(data)], torch.device("cpu"), against=AGAINST,
                rounds=options.rounds, seconds=options.seconds,
            )  # fmt: skip
            cells = {
                name: {"ms": 1e3 * t.median, "p20": 1e3 * t.p20, "p80": 1e3 * t.p80,
                       "ratio": t.ratio, "rounds": t.rounds}
                for name, t in found.items()
            }  # fmt: skip
            rows.append({"case": case.name, "rank": case.rank, "variants": cells})
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
