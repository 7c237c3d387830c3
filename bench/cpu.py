"""Compare every operation with torch's own lines on a CPU, in one run.

    OMP_NUM_THREADS=1 python -m bench.cpu               # projections, all shapes of the models
    python -m bench.cpu --operations core adamw --models SmolLM2-135M --out bench/results

Correctness comes first: a variant whose result is off is not timed. Ratios are medians over rounds
of the ratio to the best torch lines in the same round, so a busy machine moves both.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from pathlib import Path

import torch

from bench.cases import DTYPES, MODELS, RATIOS, Case, Inputs, cases, floor, variants
from bench.timing import ceilings, interleaved
from sculpt_kernels import project, reference


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument(
        "--operations",
        nargs="+",
        default=["core"],
        choices=["core", "strict", "left", "right", "compress", "expand_add", "adamw"],
    )
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(DTYPES)
    )
    parser.add_argument("--ratios", nargs="+", default=list(RATIOS), choices=list(RATIOS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=4.0, help="per case, after three rounds")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the reference too")
    parser.add_argument("--out", type=Path, help="folder for cpu.json")
    options = parser.parse_args(arguments)

    device = torch.device("cpu")
    rates = ceilings(device, size=1024, elements=2**25)
    print(f"{describe_cpu()}: copy {rates['copy'] / 1e9:.1f} GB/s, "
          f"float32 GEMM {rates['float32'] / 1e9:.0f} GFLOP/s")  # fmt: skip
    rows = []
    for case in cases(options.models, options.operations, options.dtypes, options.ratios):
        row = measure(case, device, rates, options)
        rows.append(row)
        print(line(row), flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        kind = "-".join(options.operations)
        path = options.out / f"cpu-{kind}-{torch.get_num_threads()}t.json"
        path.write_text(json.dumps({"machine": machine(), "rates": rates, "rows": rows}, indent=1))
        print(f"wrote {path}")
    worst = [row["variants"]["ours"]["ratio"] for row in rows if "ours" in row["variants"]]
    if worst:
        print(f"ours / best torch lines: largest {max(worst):.3f}, "
              f"median {sorted(worst)[len(worst) // 2]:.3f} of {len(worst)} points")  # fmt: skip


def measure(
    case: Case, device: torch.device, rates: dict[str, float], options: argparse.Namespace
) -> dict[str, object]:
    data = Inputs(case, device, seed=0)
    wrong = incorrect(data)
    if wrong:
        return {"case": case.name, "error": wrong, "variants": {}}
    found = interleaved(
        [variants(data, compiled=options.compile)], device,
        rounds=options.rounds, seconds=options.seconds,
    )  # fmt: skip
    least = floor(case, "cpu", rates["float32"], rates["copy"])
    return {
        "case": case.name,
        "model": case.model,
        "rank": case.rank,
        "floor_ms": 1e3 * least,
        "variants": {
            name: {"ms": 1e3 * t.median, "p20": 1e3 * t.p20, "p80": 1e3 * t.p80,
                   "ratio": t.ratio, "roofline": least / t.median, "rounds": t.rounds}
            for name, t in found.items()
        },
    }  # fmt: skip


def incorrect(data: Inputs) -> str | None:
    """Compare with float64 on the same inputs; the reason not to time this case, or `None`."""
    case = data.case
    if case.operation != "project" or data.G.numel() > 2**22:
        return None  # the test suite covers the rest
    U = None if case.form == "right" else data.U
    V = None if case.form == "left" else data.V
    wide = [None if X is None else X.double() for X in (data.G, U, V)]
    want = reference.project(*wide, case.form)
    got = project(data.G, U, V, form=case.form)
    error = float((got.double() - want).norm() / want.norm())
    limit = 8 * torch.finfo(data.G.dtype).eps
    return None if error <= limit else f"error {error:.1e} above {limit:.1e}"


def line(row: dict) -> str:
    if "error" in row:
        return f"{row['case']:38} WRONG: {row['error']}"
    cells = [f"{name} {v['ms']:.3f} ms ({v['ratio']:.3f}x)" for name, v in row["variants"].items()]
    return f"{row['case']:38} " + "  ".join(cells)


def describe_cpu() -> str:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for text in info.read_text().splitlines():
            if text.startswith("model name"):
                name = text.split(":", 1)[1].strip()
                break
    return f"{name}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def machine() -> dict[str, str]:
    return {
        "cpu": describe_cpu(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
