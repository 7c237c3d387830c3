"""Write the tables and pictures of README.md from the files in results/.

python -m bench.tables            # write them
python -m bench.tables --check    # exit code 1 if the tables are not those of the files
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.cases import OPERATIONS, RATIOS
from bench.contenders import RATIOS as TRAINABLE
from bench.continual_table import runs_in, sequences
from bench.llama import Shape, step_ratio
from bench.markdown import markdown
from bench.subspaces import BASELINE, SPECTRA

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
# Where the cut divides equal singular values, any directions among them are as good as others.
AMBIGUOUS = ("rank", "repeated")
Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only compare")
    options = parser.parse_args(arguments)
    page, results = HERE / "README.md", HERE / "results"
    before = page.read_text(encoding="utf-8")
    after = filled(before, sorted(results.glob("*.json")), results / "continual")
    if options.check:
        return int(before != after)
    page.write_text(after, encoding="utf-8")
    from bench import pictures

    for path in results.glob("gpu-*.json"):
        pictures.gpu(path)
    pictures.continual(results / "continual")
    return 0


def filled(page: str, files: Iterable[Path], continual: Path | None = None) -> str:
    """The page with the tables of these files, and of a folder of runs, between its two marks."""
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    for path in files:
        kind = next((kind for kind in WRITERS if path.name.startswith(kind)), None)
        if kind is not None:
            found[kind][path.name] = json.loads(path.read_text(encoding="utf-8"))
    parts = [WRITERS[kind](found[kind]) for kind in WRITERS if kind in found]
    if continual is not None:
        parts.append(sequences(runs_in(continual)))
    return head + "\n\n".join([BEGIN, *filter(None, parts), END]) + tail


def cpu(files: dict[str, Row]) -> str:
    """Ratios of every operation, both dtypes in a cell, and what the grid does not show."""
    parts = []
    for name, content in files.items():
        machine, last = content["machine"], content["runs"][-1]
        call = ", ".join(f"{key} {us:.1f} us" for key, us in last["call_us"].items())
        rates = ", ".join(
            f"{key} {rate / 1e9:.0f} {'GB/s' if key == 'copy' else 'GFLOP/s'}"
            for key, rate in last["rates"].items()
        )
        grid: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
        sums = []
        for operation in OPERATIONS:
            rows = [row for row in content["rows"] if row["operation"] == operation]
            names = dict.fromkeys(name for row in rows for name in row["variants"])
            for ours in (name for name in names if name.startswith("ours")):
                mine = [row for row in rows if ours in row["variants"]]
                what = operation + ours.removeprefix("ours")
                sums.append(_summary(what, ours, mine))
                for row in mine:
                    shape = " x ".join(map(str, row["shape"]))
                    cells = grid.setdefault((what, shape), {}).setdefault(row["rank_ratio"], {})
                    cells[row["dtype"]] = f"{row['variants'][ours]['ratio']:.2f}"
        wrong = [row["case"] for row in content["rows"] if "error" in row]
        lines = [
            [*key, *(_both(cells.get(ratio, {})) for ratio in RATIOS)]
            for key, cells in grid.items()
        ]
        parts += [
            f"### Operations, {machine['cpu']}, {_threads(machine['threads'])}",
            f"`results/{name}`: torch {machine['torch']}, {machine['capability']}; {rates}; "
            f"{last['date']}, {len(content['runs'])} calls of `python -m bench.cpu`, which the "
            "file lists. Time over that of the best chain of torch, float32 / bfloat16, by r/k.",
            markdown(["operation", "matrix", *RATIOS], lines, texts=2),
            markdown(["operation", "points", "largest", "median", "naive / chain",
                      "peak memory / chain's"], sums),
            f"A projection of an 8 x 12 matrix, all call and no work: {call}."
            + (f" Wrong, so not timed: {', '.join(wrong)}." if wrong else ""),
        ]  # fmt: skip
    return "\n\n".join(parts)


def _summary(what: str, ours: str, rows: list[Row]) -> list[str]:
    ratios, naive, memory = [], [], []
    for row in rows:
        variants = row["variants"]
        ratios.append(variants[ours]["ratio"])
        naive.append(variants["naive"]["ratio"])
        memory.append(variants[ours]["peak_bytes"] / max(1, variants["chain"]["peak_bytes"]))
    return [what, str(len(ratios)), f"{max(ratios):.2f}", f"{statistics.median(ratios):.2f}",
            _span(naive), _span(memory)]  # fmt: skip


def _span(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def _both(cells: dict[str, str]) -> str:
    return " / ".join(cells.get(dtype, "") for dtype in ("float32", "bfloat16")).strip(" /")


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def subspaces(files: dict[str, Row]) -> str:
    """Speed of each method by matrix and share, and the worst that each loses."""
    parts = []
    for name, content in files.items():
        about, rows = content["about"], content["rows"]
        methods = list(dict.fromkeys(row["method"] for row in rows))
        grid: dict[tuple[str, str], dict[str, list[Row]]] = {}
        for row in rows:
            # Planted matrices of one size differ in their spectrum.
            key = row["matrix"].removesuffix(_spectrum(row)).strip(), f"{row['trainable']:g}"
            grid.setdefault(key, {}).setdefault(row["method"], []).append(row)
        lines = [[*key, *(_speed(cells.get(m, [])) for m in methods)]
                 for key, cells in sorted(grid.items())]  # fmt: skip
        worst = []
        for method in methods:
            mine = [row for row in rows if row["method"] == method and "defect" in row]
            told = [1 - row["cosine"] for row in mine if _spectrum(row) not in AMBIGUOUS]
            if mine:
                lost = max(1 - row["energy"] for row in mine)
                defect = max(row["defect"] for row in mine)
                worst.append([method, *(f"{max(x, 0.0):.0e}" for x in (lost, max(told), defect))])
        parts += [
            f"### Subspaces, {about.get('cpu', about.get('device'))}, {_threads(about['threads'])}",
            f"`results/{name}`: torch {about['torch']}, {about['date']}. Seconds of `{BASELINE}` "
            "of the float32 matrix, and how many times faster each method is: medians over rounds "
            "in which the methods take turns; of planted matrices the range over four spectra.",
            markdown(["matrix", "t/k", *methods], lines),
            "The worst of all matrices: energy lost, 1 - what is captured over the optimum; angle, "
            "1 - mean squared cosine with the exact span, where the cut divides no equal singular "
            "values; defect, the largest entry of `QᵀQ - I`.",
            markdown(["method", "energy lost", "angle", "defect"], worst),
        ]
    return "\n\n".join(parts)


def _spectrum(row: Row) -> str:
    return next((word for word in SPECTRA if row["matrix"].endswith(f" {word}")), "")


def _speed(rows: list[Row]) -> str:
    """Of the baseline seconds, of others how many times faster; the range over spectra."""
    baseline = any(row["method"] == BASELINE for row in rows)
    key, unit = ("seconds", " s") if baseline else ("speedup", "x")
    values = sorted(row[key] for row in rows)
    ends = dict.fromkeys(f"{value:.2g}" for value in (*values[:1], *values[-1:]))
    return " to ".join(ends) + unit * bool(ends)


def training(files: dict[str, Row]) -> str:
    """All files in one table."""
    lines = []
    for content in sorted(files.values(), key=lambda c: (c["case"], c["tokens"])):
        for row in content["rows"]:
            ratio = TRAINABLE.get(row["method"].removeprefix("sculpt "))
            sums = ratio and step_ratio(Shape(**content["shape"]), content["tokens"], ratio)
            lines.append([
                f"{content['case']}, {content['tokens']}", row["method"], f"{row['seconds']:.3f}",
                f"{row['of_plain']:.2f}", f"{sums:.2f}" if sums else "",
                f"{row['saved_bytes'] / 2**20:,.0f}", f"{row['optimizer_bytes'] / 2**20:,.1f}",
                f"{row['leak']:.1e}", f"{row['rounding_floor']:.1e}",
            ])  # fmt: skip
    head = ["case, tokens", "method", "s/step", "of plain", "by arithmetic",
            "saved activations, MiB", "optimizer, MiB", "leak of ΔW", "rounding floor"]  # fmt: skip
    return "\n\n".join([_title("Training steps", "training-*", files), markdown(head, lines, 2)])


def training_memory(files: dict[str, Row]) -> str:
    columns = {
        "peak above the libraries, MiB": "peak_bytes",
        "held between steps, MiB": "held_bytes",
        "most of a step beside it, MiB": "step_bytes",
        "predicted peak, MiB": "predicted_bytes",
    }
    lines = []
    for content in files.values():
        for row in content["memory"]:
            cells = (f"{row[k] / 2**20:,.0f}" if row[k] else "" for k in columns.values())
            case = f"{content['case']}, {content['tokens']}"
            lines.append([case, row["method"], f"{row['of_plain']:.2f}", *cells])
    title = _title("Memory of training steps", "training-memory-*", files)
    return "\n\n".join(
        [title, markdown(["case, tokens", "method", "of plain", *columns], lines, 2)]
    )


def _title(what: str, pattern: str, files: dict[str, Row]) -> str:
    first = next(iter(files.values()))
    dates = sorted(content["date"] for content in files.values())
    span = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return (
        f"### {what}\n\n`results/{pattern}.json`: {first['cpu']}, {_threads(first['threads'])}, "
        f"torch {first['torch']}, PEFT {first['peft']}, {span}."
    )


def gpu(files: dict[str, Row]) -> str:
    """All that one call of `bench.gpu` measured, a file for each device."""
    writers = {
        "rows": _kernels, "compiled": _kernels, "subspaces": _gpu_subspaces,
        "training": _gpu_training, "curvature": _gpu_curvature, "continual": sequences,
    }  # fmt: skip
    parts = []
    for name, content in files.items():
        checks, rates = content["checks"], content.get("rates", {})
        failed = [f"{c['what']} {c['dtype']}".strip() for c in checks if not c["ok"]]
        speeds = ", ".join(f"{key} {rate / 1e12:.3g}" for key, rate in rates.items())
        parts += [
            f"### {content['device']}" + (" (rehearsal)" if content["tiny"] else ""),
            f"`results/{name}`: torch {content['torch']}, triton {content['triton']}, Python "
            f"{content['python']}, {content['date']}, `python -m bench.gpu`, {content['seconds']} "
            f"s. Copies (TB/s) and large products (TFLOP/s): {speeds}. "
            f"{len(checks) - len(failed)} of {len(checks)} checks passed"
            + (f"; not: {', '.join(failed)}." if failed else "."),
        ]
        for key, write in writers.items():
            if content.get(key):
                parts.append(write(content[key]))
                if key in ("rows", "subspaces", "training"):
                    parts.append(f"![{key}](results/{name.removesuffix('.json')}-{key}.png)")
        if content["skipped"]:
            parts.append("Not measured: " + "; ".join(content["skipped"]) + ".")
    return "\n\n".join(parts)


def best(row: Row) -> tuple[str, Row]:
    """The fastest variant of ours."""
    ours = {k: v for k, v in row["variants"].items() if k.startswith(("ours", "triton"))}
    return min(ours.items(), key=lambda item: item[1]["us"])


def _kernels(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        variants, (name, ours) = row["variants"], best(row)
        others = ", ".join(f"{k.removeprefix('ours, ')} {v['ratio']:.2f}"
                           for k, v in variants.items() if k not in ("chain", name))  # fmt: skip
        called = f"{ours['called_ratio']:.2f}" if "called_ratio" in ours else ""
        lines.append([row["case"], f"{variants['chain']['us']:.0f}", f"{ours['us']:.0f}",
                      f"{ours['ratio']:.2f}", called, f"{ours['roofline']:.0%}", name,
                      others])  # fmt: skip
    text = ("Microseconds on the device, medians; ratios within rounds to the best chain of torch, "
            "as is *called*, with launches from Python; *roofline*: the least time at the rates "
            "above over the time of the best of ours.")  # fmt: skip
    head = ["case", "chain, us", "best of ours, us", "ratio", "called", "roofline", "best",
            "the others, ratio"]  # fmt: skip
    return f"{text}\n\n{markdown(head, lines)}"


def _gpu_curvature(rows: list[Row]) -> str:
    lines = [
        [row["factors"], str(row["layers"]), f"{row['tokens']:,}", f"{row['pass_seconds']:.2f}",
         f"{row['choice_seconds']:.2f}", f"{row['bytes'] / 1e9:.1f}",
         f"{row['peak_bytes'] / 1e9:.1f}" if row["peak_bytes"] else ""]
        for row in rows
    ]  # fmt: skip
    text = "Protecting a task of 64 rows in the LLaMA-2-7B configuration, of which so many layers:"
    head = ["factors", "layers", "tokens", "pass, s", "choice, s", "held, GB", "peak, GB"]
    return f"{text}\n\n{markdown(head, lines)}"


def _gpu_subspaces(rows: list[Row]) -> str:
    slow = {row["matrix"]: row["seconds"] for row in rows if row["method"] == "svd"}
    lines = []
    for row in rows:
        svd = slow.get(row["matrix"])
        lost = f"{max(0.0, 1 - row['of_optimum']):.0e}" if "of_optimum" in row else ""
        predicted = f"{row['predicted']:.3g}" if "predicted" in row else ""
        times = f"{svd / row['seconds']:.1f}x" if svd else ""
        lines.append([row["matrix"], row["method"], f"{row['seconds']:.3g}", predicted, times, lost,
                      row.get("used", "")])  # fmt: skip
    head = ["matrix", "method", "s", "predicted, s", "faster than SVD", "energy lost", "by"]
    text = "**Subspaces**, three quarters of the directions preserved"
    return f"{text}\n\n{markdown(head, lines, 2)}"


def _gpu_training(rows: list[Row]) -> str:
    plain = {row["tokens"]: row["seconds"] for row in rows if row["method"] == "plain"}
    phases = ("forward", "backward", "optimizer", "fold")
    lines = []
    for row in sorted(rows, key=lambda row: -row["tokens"]):
        of_plain = row["seconds"] / plain[row["tokens"]] if row["tokens"] in plain else None
        peak = f"{row['peak_bytes'] / 1e9:.1f}" if row["peak_bytes"] else ""
        lines.append([
            row["method"], f"{row['tokens']:,}", f"{row['seconds']:.3f}",
            f"{of_plain:.2f}" if of_plain else "", f"{row['tokens_per_second']:,.0f}",
            f"{row['utilisation']:.0%}", *(f"{row['phases'][phase]:.3f}" for phase in phases),
            peak, f"{row['optimizer_bytes'] / 1e9:.2f}",
        ])  # fmt: skip
    head = ["method", "tokens", "s/step", "of plain", "tokens/s", "MFU", *phases, "peak, GB",
            "optimizer, GB"]  # fmt: skip
    text = ("**Training steps** of a model in the LLaMA-2-7B configuration, bfloat16, activation "
            "checkpointing; MFU: FLOPs of a plain step, nothing recomputed, over the rate of large "
            "products")  # fmt: skip
    return f"{text}\n\n{markdown(head, lines)}"


def curvature(files: dict[str, Row]) -> str:
    """What protecting a task takes in steps, and what sketches lose."""
    parts = []
    for name, content in files.items():
        machine, took = content["machine"], content["seconds"]
        steps = [
            [of, *(f"{took[what] / took[of]:.1f}" for what in ("pass", "choice"))]
            for of in ("plain step", "sculpt step")
        ]
        sketches = [
            [
                str(row["rank"]),
                f"{row['bytes']['sketch'] / row['bytes']['exact']:.2f}",
                *(_of(row[part]) for part in ("captured", "unknown", "given up")),
            ]
            for row in content["sketches"]
        ]
        parts += [
            f"### Protecting a task, {content['model']}",
            f"`results/{name}`: `python -m bench.curvature`, {machine['cpu']}, torch "
            f"{machine['torch']}, {_threads(machine['threads'])}, {machine['date']}. 64 rows of "
            f"{content['tokens']} tokens in steps of such rows: a pass over 64 of them, and the "
            "choice of all directions, once a task.",
            markdown(["", "pass", "choice"], steps),
            "Sketches beside exact factors, median (least to most): the trace in their "
            "eigenvectors over what as many directions can hold, the share of the trace that they "
            "do not tell apart, and the earlier curvature in the directions that they choose over "
            "that in those of exact factors.",
            markdown(["rank", "bytes / exact", "captured", "unknown", "given up"], sketches),
        ]
    return "\n\n".join(parts)


def _of(spread: dict[str, float]) -> str:
    return f"{spread['median']:.3g} ({spread['least']:.3g} to {spread['most']:.3g})"


WRITERS: dict[str, Callable[[dict[str, Row]], str]] = {
    "gpu-": gpu,
    "cpu-": cpu,
    "subspaces-": subspaces,
    "curvature-": curvature,
    "training-memory-": training_memory,
    "training-": training,
}


if __name__ == "__main__":
    raise SystemExit(main())
