"""Compare every operation with torch's own lines on a CPU, in one run or in pieces.

    OMP_NUM_THREADS=1 python -m bench.cpu               # projections, all shapes of the models
    python -m bench.cpu --operations core adamw --models SmolLM2-135M --out bench/results

Correctness comes first: a variant whose result is off is not timed. Ratios are medians over rounds
of the ratio to the best torch lines in the same round, so a busy machine moves both. With `--out`
the points replace those of an earlier run on the same machine, and `python -m bench.tables` writes
the tables of README.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bench import memory
from bench.cases import DTYPES, MODELS, RATIOS, Case, Inputs, cases, floor, variants
from bench.correct import incorrect
from bench.timing import ceilings, interleaved
from sculpt_kernels import project_
from sculpt_kernels.products import has_fast_products

Row = dict[str, Any]


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
    parser.add_argument("--shapes", nargs="+", metavar="MxN", help="only these of the models")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=4.0, help="per case, after three rounds")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the reference too")
    parser.add_argument(
        "--convert",
        action="store_true",
        help="bfloat16 as on a processor without instructions for it, in a file of its own",
    )
    parser.add_argument("--out", type=Path, help="folder for cpu-....json")
    options = parser.parse_args(arguments)

    if options.convert:
        import_module("sculpt_kernels.projection.project").has_fast_products = lambda *_: False
    device = torch.device("cpu")
    began = time.monotonic()
    rates = ceilings(device, size=1024, elements=2**25)
    print(f"{describe_cpu()}: copy {rates['copy'] / 1e9:.1f} GB/s, "
          f"float32 GEMM {rates['float32'] / 1e9:.0f} GFLOP/s")  # fmt: skip
    rows = []
    for case in cases(options.models, options.operations, options.dtypes, options.ratios):
        m, n = case.shape
        if options.shapes and f"{m}x{n}" not in options.shapes:
            continue
        row = measure(case, device, rates, options)
        rows.append(row)
        print(line(row), flush=True)
    if options.out:
        command = " ".join(sys.argv[1:] if arguments is None else arguments)
        run = {
            "command": f"python -m bench.cpu {command}".strip(),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "seconds": round(time.monotonic() - began),
            "rates": rates,
            "call_us": calls(device),
        }
        print(f"wrote {save(options.out, rows, run, machine(converts=options.convert))}")
    worst = [
        min(v["ratio"] for name, v in row["variants"].items() if name.startswith("ours"))
        for row in rows
        if row["variants"]
    ]
    if worst:
        print(f"ours / best torch lines: largest {max(worst):.3f}, "
              f"median {sorted(worst)[len(worst) // 2]:.3f} of {len(worst)} points")  # fmt: skip


def measure(
    case: Case, device: torch.device, rates: dict[str, float], options: argparse.Namespace
) -> Row:
    data = Inputs(case, device, seed=0)
    row: Row = {
        "case": case.name,
        "model": case.model,
        "operation": case.name.split()[0],
        "shape": list(case.shape),
        "rank_ratio": case.ratio,
        "rank": case.rank,
        "dtype": case.dtype,
        "matrix_bytes": data.G.numel() * data.G.element_size(),
        "variants": {},
    }
    wrong = incorrect(data)
    if wrong:
        return row | {"error": wrong}
    timed = variants(data, compiled=options.compile)
    taken = {name: memory.peak(call) for name, call in timed.items()}
    found = interleaved([timed], device, rounds=options.rounds, seconds=options.seconds)
    least = floor(case, "cpu", rates.get(case.dtype, rates["float32"]), rates["copy"])
    row["floor_ms"] = 1e3 * least
    row["variants"] = {
        name: {"ms": 1e3 * t.median, "p20": 1e3 * t.p20, "p80": 1e3 * t.p80,
               "ratio": t.ratio, "roofline": least / t.median, "rounds": t.rounds,
               "peak_bytes": taken[name].total, "largest_bytes": taken[name].largest}
        for name, t in found.items()
    }  # fmt: skip
    return row


def calls(device: torch.device) -> dict[str, float]:
    """Microseconds of a projection that has next to nothing to compute: what a call costs."""
    G, U, V = (
        torch.randn(8, 12),
        torch.eye(8)[:, :3].contiguous(),
        torch.eye(12)[:, :3].contiguous(),
    )
    operator = torch.ops.sculpt_kernels.project_

    def chain() -> None:
        G.addmm_(U @ (U.T @ (G @ V)), V.T, alpha=-1)

    found = interleaved(
        [{
            "chain": chain,
            "ours": lambda: project_(G, U, V),
            "ours, as an operator": lambda: operator(
                G, U, V, "core", "auto", False, "none", "standard"
            ),
        }],
        device,
        rounds=31,
        seconds=3.0,
    )  # fmt: skip
    return {name: 1e6 * t.median for name, t in found.items()}


def line(row: Row) -> str:
    if "error" in row:
        return f"{row['case']:38} WRONG: {row['error']}"
    size = row["matrix_bytes"]
    cells = [
        f"{name} {v['ms']:.3f} ms ({v['ratio']:.3f}x, +{v['peak_bytes'] / size:.2f})"
        for name, v in row["variants"].items()
    ]
    return f"{row['case']:38} " + "  ".join(cells)


def save(folder: Path, rows: list[Row], run: Row, here: Row) -> Path:
    """Add the points to the file of this machine; a point that was measured again is replaced."""
    threads = here["threads"]
    name = re.sub(r"[^A-Za-z0-9]+", "-", here["cpu"]).strip("-")
    name += f"-{threads}-thread{'s' if threads > 1 else ''}"
    path = folder / f"cpu-{name}{'-converting' if here['converts_bfloat16'] else ''}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    if found and found["machine"] != here:
        raise SystemExit(f"{path} is of another machine or torch: {found['machine']}; move it away")
    points = {row["case"]: row for row in (*found.get("rows", []), *rows)}
    _compare_with_float32(points)
    folder.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(
        f'{{"machine": {json.dumps(here)},\n'
        f'"runs": {_lines([*found.get("runs", []), run])},\n'
        f'"rows": {_lines(sorted(points.values(), key=_place))}}}\n'
    )
    new.replace(path)
    return path


def _lines(rows: list[Row]) -> str:
    """A JSON list with one row a line, figures to five digits."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: short(inner) for key, inner in value.items()}
        return float(f"{value:.5g}") if isinstance(value, float) else value

    return "[\n" + ",\n".join(json.dumps(short(row)) for row in rows) + "\n]"


def _compare_with_float32(points: dict[str, Row]) -> None:
    """Note in low-precision points how much longer they take than float32."""
    for case, row in points.items():
        wide = points.get(case.rsplit(" ", 1)[0] + " float32")
        if wide is None or wide is row:
            continue
        for name, variant in row["variants"].items():
            if name in wide["variants"]:
                variant["of_float32"] = variant["ms"] / wide["variants"][name]["ms"]


def _place(row: Row) -> tuple[Any, ...]:
    """Order of the points in the file: by operation, then as in the tables of shapes."""
    models = list(MODELS)
    return (
        row["operation"],
        models.index(row["model"]),
        MODELS[row["model"]].index(tuple(row["shape"])),
        list(DTYPES).index(row["dtype"]),
        list(RATIOS).index(row["rank_ratio"]),
    )


def describe_cpu() -> str:
    here = machine()
    return f"{here['cpu']}, {here['threads']} thread(s), torch {here['torch']}"


def machine(*, converts: bool = False) -> Row:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for text in info.read_text().splitlines():
            if text.startswith("model name"):
                name = text.split(":", 1)[1].strip()
                break
    return {
        "cpu": name,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_instructions": has_fast_products(torch.bfloat16, "cpu"),
        "converts_bfloat16": converts or not has_fast_products(torch.bfloat16, "cpu"),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
