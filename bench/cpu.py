"""Every operation beside torch's own lines on a CPU, in one run or in pieces.

    OMP_NUM_THREADS=1 python -m bench.cpu               # projections, all shapes of the models
    python -m bench.cpu --operations core adamw --models SmolLM2-135M --out bench/results

A variant whose result is off is not timed. Ratios are medians over rounds of the ratio to the best
lines of torch in the same round, so a busy machine moves both. With `--out` the points replace
those of an earlier run on the same machine, and `python -m bench.tables` writes the tables.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import memory
from bench.cases import DTYPES, MODELS, OPERATIONS, RATIOS, Case, Inputs, cases, floor, variants
from bench.checks import incorrect
from bench.machine import about
from bench.timing import ceilings, interleaved
from sculpt.storage.files import replacing_file
from sculpt_kernels import project_

Row = dict[str, Any]
CPU = torch.device("cpu")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--operations", nargs="+", default=["core"], choices=OPERATIONS)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=[*DTYPES])
    parser.add_argument("--ratios", nargs="+", default=list(RATIOS), choices=list(RATIOS))
    parser.add_argument("--shapes", nargs="+", metavar="MxN", help="only these of the models")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=4.0, help="per case, after three rounds")
    parser.add_argument("--out", type=Path, help="folder for cpu-....json")
    options = parser.parse_args(arguments)
    began, here = time.monotonic(), about()
    rates = ceilings(CPU, size=1024, elements=2**25)
    print(f"{here['cpu']}, {here['threads']} thread(s), torch {here['torch']}:",
          {key: f"{rate:.3g}" for key, rate in rates.items()})  # fmt: skip
    rows = []
    for case in cases(options.models, options.operations, options.dtypes, options.ratios):
        m, n = case.shape
        if options.shapes and f"{m}x{n}" not in options.shapes:
            continue
        rows.append(measure(case, rates, options.rounds, options.seconds))
        print(line(rows[-1]), flush=True)
    if options.out:
        command = " ".join(sys.argv[1:] if arguments is None else arguments)
        run = {
            "command": f"python -m bench.cpu {command}".strip(),
            "date": here["date"],
            "seconds": round(time.monotonic() - began),
            "rates": rates,
            "call_us": calls(),
        }
        print(f"wrote {save(options.out, rows, run, here)}")


def measure(case: Case, rates: dict[str, float], rounds: int, seconds: float) -> Row:
    data = Inputs(case, CPU, seed=0)
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
    if wrong := incorrect(case, CPU):
        return row | {"error": wrong}
    calls = variants(data)
    taken = {name: memory.peak(call) for name, call in calls.items()}
    found = interleaved([calls], CPU, rounds=rounds, seconds=seconds)
    least = floor(case, "cpu", rates.get(case.dtype, rates["float32"]), rates["copy"])
    row["floor_ms"] = 1e3 * least
    row["variants"] = {
        name: {"ms": 1e3 * t.median, "p20": 1e3 * t.p20, "p80": 1e3 * t.p80, "ratio": t.ratio,
               "roofline": least / t.median, "rounds": t.rounds,
               "peak_bytes": taken[name].total, "largest_bytes": taken[name].largest}
        for name, t in found.items()
    }  # fmt: skip
    return row


def calls() -> dict[str, float]:
    """Microseconds of a projection that has next to nothing to compute: what a call costs."""
    G, U, V = torch.randn(8, 12), *(torch.eye(n)[:, :3].contiguous() for n in (8, 12))

    def chain() -> None:
        G.addmm_(U @ (U.T @ (G @ V)), V.T, alpha=-1)

    sets = [{"chain": chain, "ours": lambda: project_(G, U, V)}]
    found = interleaved(sets, CPU, rounds=31, seconds=3.0)
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
    machine = {key: here[key] for key in ("cpu", "threads", "capability", "torch")}
    name = re.sub(r"[^A-Za-z0-9]+", "-", here["cpu"]).strip("-")
    path = folder / f"cpu-{name}-{here['threads']}-thread{'s' * (here['threads'] > 1)}.json"
    found = json.loads(path.read_text()) if path.exists() else {"machine": machine}
    if found["machine"] != machine:
        raise SystemExit(f"{path} is of another machine or torch: {found['machine']}; move it away")
    points = {row["case"]: row for row in (*found.get("rows", []), *rows)}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as temporary:
        temporary.write_text(
            f'{{"machine": {json.dumps(machine)},\n'
            f'"runs": {_lines([*found.get("runs", []), run])},\n'
            f'"rows": {_lines(sorted(points.values(), key=_place))}}}\n'
        )
    return path


def _lines(rows: list[Row]) -> str:
    """A JSON list with one row a line, figures to five digits."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: short(inner) for key, inner in value.items()}
        return float(f"{value:.5g}") if isinstance(value, float) else value

    return "[\n" + ",\n".join(json.dumps(short(row)) for row in rows) + "\n]"


def _place(row: Row) -> tuple[Any, ...]:
    """Order of the points in the file: by operation, then as in the tables of shapes."""
    return (
        row["operation"],
        list(MODELS).index(row["model"]),
        MODELS[row["model"]].index(tuple(row["shape"])),
        list(DTYPES).index(row["dtype"]),
        list(RATIOS).index(row["rank_ratio"]),
    )


if __name__ == "__main__":
    main()
