"""Write the tables of README.md from the files in results/.

python -m bench.tables            # write them
python -m bench.tables --check    # exit code 1 if they are not those of the files
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.cases import RATIOS
from bench.continual_table import table as continual_table
from bench.engines import table as engines_table
from bench.gpu_table import draw as draw_gpu
from bench.gpu_table import table as gpu_table
from bench.importance import table as importance_table
from bench.inspection import table as inspection_table
from bench.native import tables as native_tables
from bench.stream import table as stream_table
from bench.subspace_table import subspaces
from bench.training import table as training_table

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
WORDS = {
    "core": "`project_`, core",
    "strict": "`project_`, strict",
    "left": "`project_`, left",
    "right": "`project_`, right",
    "compress": "`compress`",
    "expand_add": "`expand_add_`",
    "adamw": "`project_adamw_`, core",
}
Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    options = parser.parse_args(arguments)
    page = HERE / "README.md"
    before = page.read_text(encoding="utf-8")
    files = sorted((HERE / "results").glob("*.json"), key=lambda path: path.stem)
    after = filled(before, files, continual_table(HERE / "results/continual"))
    if options.check:
        return int(before != after)
    page.write_text(after, encoding="utf-8")
    for path in files:
        if path.name.startswith("gpu-"):
            draw_gpu(path)
    return 0


def filled(page: str, files: Iterable[Path], *more: str) -> str:
    """The page with the tables of these files, and `more`, between its two marks."""
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    parts = []
    for path in files:
        content = json.loads(path.read_text(encoding="utf-8"))
        write = next((w for name, w in WRITERS.items() if path.name.startswith(name)), None)
        if write is not None and (content.get("rows") or content.get("memory")):
            parts.append(write(path.name, content))
    return head + "\n\n".join([BEGIN, *parts, *filter(None, more), END]) + tail


def cpu(name: str, content: Row) -> str:
    machine = content["machine"]
    rates = content["runs"][-1]["rates"]
    native = "with" if machine["bfloat16_instructions"] else "without"
    if machine["bfloat16_instructions"] and machine["converts_bfloat16"]:
        native = "as without"
    parts = [
        f"### {machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}",
        f"`results/{name}`: torch {machine['torch']}, {machine['capability']}, {native} bfloat16 "
        f"instructions; copies {rates['copy'] / 1e9:.0f} GB/s, products "
        + ", ".join(f"{key} {rates[key] / 1e9:.0f} GFLOP/s" for key in rates if key != "copy")
        + ". Measured by",
        "\n".join(f"- {run['date']}, {run['seconds']} s: `{run['command']}`"
                  for run in content["runs"]),
    ]  # fmt: skip
    if machine["converts_bfloat16"]:
        parts.append("Time of bfloat16 / time of float32")
        parts.append(_grid(content["rows"], "ours", _of_float32))
        if machine["bfloat16_instructions"]:
            return "\n\n".join(parts)  # the chain used them, so nothing else compares
    call = content["runs"][-1]["call_us"]
    figures = ", ".join(f"{key} {us:.1f} us" for key, us in call.items())
    parts.append(f"A projection of an 8 x 12 matrix, all call and no work: {figures}.")
    operations = dict.fromkeys(row["operation"] for row in content["rows"])
    for operation in sorted(operations, key=list(WORDS).index):
        rows = [row for row in content["rows"] if row["operation"] == operation]
        parts += _operation(operation, rows)
    return "\n\n".join(parts)


def _operation(operation: str, rows: list[Row]) -> list[str]:
    wrong = [row["case"] for row in rows if "error" in row]
    rows = [row for row in rows if "error" not in row]
    names = dict.fromkeys(name for row in rows for name in row["variants"])
    parts = []
    for ours in (name for name in names if name.startswith("ours")):
        what = WORDS[operation] + ours.removeprefix("ours")
        ratios = _values(rows, ours, "ratio")
        parts.append(f"**{what}: time / best chain of torch**, largest {max(ratios):.3f}, "
                     f"median {statistics.median(ratios):.2f} of {len(ratios)} points")  # fmt: skip
        parts.append(_grid(rows, ours, lambda v, _: f"{v['ratio']:.2f}"))
        if ours != "ours" and operation != "adamw":
            continue
        parts.append(_summary(rows, ours))
        if operation == "core":
            parts.append("Peak memory beside the arguments, as a share of the matrix: "
                         "ours (chain)")  # fmt: skip
            parts.append(_grid(rows, ours, _memory))
            parts.append("Milliseconds (share of the roofline)")
            parts.append(_grid(rows, ours, lambda v, _: f"{v['ms']:.3g} ({v['roofline']:.0%})"))
    if wrong:
        parts.append(f"Wrong, so not timed: {', '.join(wrong)}.")
    return parts


def _summary(rows: list[Row], ours: str) -> str:
    """What the grid of ratios does not show, in ranges over all points."""
    naive = _values(rows, "naive", "ratio")
    text = f"The naive line takes {_span(naive)} of the chain."
    memory = [row["variants"][ours]["peak_bytes"] / max(1, row["variants"]["chain"]["peak_bytes"])
              for row in rows if ours in row["variants"]]  # fmt: skip
    text += f" Peak memory beside the arguments is {_span(memory)} of the chain's."
    slower = [row["variants"][ours]["of_float32"] for row in rows
              if "of_float32" in row["variants"].get(ours, {})]  # fmt: skip
    if slower:
        text += f" Low precision takes {_span(slower)} of the time of float32."
    return text


def _values(rows: list[Row], variant: str, key: str) -> list[float]:
    return [row["variants"][variant][key] for row in rows if variant in row["variants"]]


def _span(values: list[float]) -> str:
    return f"{min(values):.2f}x to {max(values):.2f}x"


def _memory(variant: Row, row: Row) -> str:
    size = row["matrix_bytes"]
    chain = row["variants"]["chain"]
    return f"{variant['peak_bytes'] / size:.2f} ({chain['peak_bytes'] / size:.2f})"


def _of_float32(variant: Row, row: Row) -> str | None:
    return f"{variant['of_float32']:.2f}" if "of_float32" in variant else None


def _grid(rows: list[Row], variant: str, cell: Callable[[Row, Row], str | None]) -> str:
    """Shapes and dtypes down, ratios of rank to the short side across."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        found = row["variants"].get(variant)
        text = cell(found, row) if found else None
        if text:
            m, n = row["shape"]
            lines.setdefault((f"{m} x {n}", row["dtype"]), {})[row["rank_ratio"]] = text
    columns = [ratio for ratio in RATIOS if any(ratio in line for line in lines.values())]
    table = [["shape", "dtype", *(f"r = {ratio} k" for ratio in columns)], ["---"] * 2]
    table[1] += ["---:"] * len(columns)
    table += [[*key, *(line.get(ratio, "") for ratio in columns)] for key, line in lines.items()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in table)


def training(name: str, content: Row) -> str:
    return f"### Training steps, `results/{name}`\n\n{training_table([content]).rstrip()}"


def native(name: str, content: Row) -> str:
    about = content["machine"]
    head = (
        f"### Native CPU kernels, {about['threads']} threads\n\n`results/{name}`: {about['cpu']}, "
        f"{about['isa']}, torch {about['torch']}, {about['date']}, `python -m bench.native`. "
        "Ratios of time to the first column, medians within rounds; below 1 is faster."
    )
    return "\n\n".join([head, *native_tables(content["rows"])])


WRITERS: dict[str, Callable[[str, Row], str]] = {
    "cpu-": cpu,
    "engines-": engines_table,
    "gpu-": gpu_table,
    "native-": native,
    "importance-": importance_table,
    "inspection": inspection_table,
    "stream-": stream_table,
    "subspaces-": subspaces,
    "training-": training,
}


if __name__ == "__main__":
    raise SystemExit(main())
