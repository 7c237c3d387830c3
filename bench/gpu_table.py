"""The tables of one file of `bench.gpu`, as Markdown, and a picture beside each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.cases import RATIOS
from bench.gpu_parts.subspaces import times_svd

Row = dict[str, Any]
WORDS = {
    "core": "`project_`, core",
    "strict": "`project_`, strict",
    "left": "`project_`, left",
    "many": "`project_many_`, core, the matrices of four layers",
    "adamw": "`project_adamw_`, core",
    "compress": "`compress`",
    "expand_add": "`expand_add_`",
}
INK, OURS, THEIRS, THIRD = "#1b1f24", "#0b6e4f", "#9aa5b1", "#d08c1f"


def table(name: str, content: Row) -> str:
    rates = content.get("rates", {})
    parts = [
        f"### {content['device']}" + (" (rehearsal)" if content["tiny"] else ""),
        f"`results/{name}`: torch {content['torch']}, triton {content['triton']}, Python "
        f"{content['python']}, {content['date']}, `python -m bench.gpu`, {content['seconds']} s. "
        + _rates(rates),
        _checks(content["checks"]),
    ]
    writers: dict[str, Callable[[Row], list[str]]] = {
        "rows": _kernels, "compiled": _compiled, "subspaces": _subspaces,
        "training": _training, "continual": _continual, "parts": _parts,
    }  # fmt: skip
    for key, write in writers.items():
        if content.get(key):
            parts += write(content)
            if key in PICTURES:
                stem = name.removesuffix(".json")
                parts.append(f"![{PICTURES[key][0]}](results/{stem}-{key}.png)")
    if content["skipped"]:
        parts.append("Not measured: " + "; ".join(content["skipped"]) + ".")
    return "\n\n".join(parts)


def _rates(rates: dict[str, float]) -> str:
    if not rates:
        return ""
    products = ", ".join(f"{key} {rate / 1e12:.3g}" for key, rate in rates.items() if key != "copy")
    return f"Copies {rates['copy'] / 1e12:.3g} TB/s; large products, TFLOP/s: {products}."


def _checks(checks: list[Row]) -> str:
    failed = [f"{c['what']} {c['dtype']}".strip() for c in checks if not c["ok"]]
    text = f"{len(checks) - len(failed)} of {len(checks)} checks passed"
    return f"{text}; not: {', '.join(failed)}." if failed else f"{text}."


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A table whose first `texts` columns are text and the others figures."""
    rule = ["---"] * texts + ["---:"] * (len(head) - texts)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def split_name(case: str) -> tuple[str, str, str]:
    """Operation, what it is done on, and the ratio of rank to the short side."""
    words = case.split()
    ratio = next(i for i, word in enumerate(words) if word in RATIOS)
    return words[0], " ".join(words[1:ratio]), words[ratio]


def best(row: Row) -> tuple[str, Row]:
    """The fastest variant of ours."""
    ours = {k: v for k, v in row["variants"].items() if k.startswith(("ours", "triton"))}
    return min(ours.items(), key=lambda item: item[1]["us"])


def _kernels(content: Row) -> list[str]:
    parts = ["Microseconds on the device (captured graphs), medians; ratios within rounds to the "
             "best chain of torch, as is *called*, with launches from Python; *roofline*: the "
             "least time at the rates above over the time of the best of ours."]  # fmt: skip
    head = ["matrix", "r/k", "naive", "chain, us", "best of ours, us", "ratio", "called",
            "roofline", "the others of ours"]  # fmt: skip
    for operation, word in WORDS.items():
        lines = []
        for row in content["rows"]:
            what, matrix, ratio = split_name(row["case"])
            if what != operation:
                continue
            chain, (name, ours) = row["variants"]["chain"], best(row)
            naive = row["variants"].get("naive")
            others = ", ".join(
                f"{k.removeprefix('ours, ')} {v['ratio']:.2f}"
                for k, v in row["variants"].items()
                if k.startswith(("ours", "triton")) and k != name
            )
            called = f"{ours['called_ratio']:.2f}" if "called_ratio" in ours else ""
            first = f"{ours['us']:.0f} ({name.removeprefix('ours, ')})"
            lines.append([matrix, ratio, f"{naive['ratio']:.2f}" if naive else "",
                          f"{chain['us']:.0f}", first, f"{ours['ratio']:.2f}", called,
                          f"{ours['roofline']:.0%}", others])  # fmt: skip
        if lines:
            parts += [f"**{word}**", markdown(head, lines, texts=2)]
    return parts


def _compiled(content: Row) -> list[str]:
    lines = []
    for row in content["compiled"]:
        name, ours = best(row)
        chain, compiled = row["variants"]["chain"], row["variants"]["compiled"]
        lines.append([row["case"], f"{chain['us']:.0f}", f"{compiled['us']:.0f}",
                      f"{ours['us']:.0f} ({name.removeprefix('ours, ')})",
                      f"{compiled['ratio']:.2f}", f"{ours['ratio']:.2f}"])  # fmt: skip
    head = ["case", "chain, us", "torch.compile, us", "ours, us", "torch.compile / chain",
            "ours / chain"]  # fmt: skip
    return ["The reference under `torch.compile`, as called from Python", markdown(head, lines)]


def _subspaces(content: Row) -> list[str]:
    rows = content["subspaces"]
    slow = {row["matrix"]: row["seconds"] for row in rows if row["method"] == "svd"}
    lines = []
    for row in rows:
        svd = slow.get(row["matrix"])
        times = svd / row["seconds"] if svd else None
        if row["method"] == "auto float64":
            times = times_svd(rows)
        lost = f"{max(0.0, 1 - row['of_optimum']):.0e}" if "of_optimum" in row else ""
        predicted = f"{row['predicted']:.3g}" if "predicted" in row else ""
        lines.append([row["matrix"], row["method"], f"{row['seconds']:.3g}", predicted,
                      f"{times:.1f}x" if times else "", lost, row.get("used", "")])  # fmt: skip
    head = ["matrix", "method", "s", "predicted, s", "faster than SVD", "energy lost", "by"]
    return ["**Subspaces**, three quarters of the directions preserved", markdown(head, lines, 2)]


def _training(content: Row) -> list[str]:
    rows = content["training"]
    plain = {row["tokens"]: row["seconds"] for row in rows if row["method"] == "plain"}
    phases = ("forward", "backward", "optimizer", "fold")
    lines = []
    for row in sorted(rows, key=lambda row: -row["tokens"]):
        of_plain = row["seconds"] / plain[row["tokens"]] if row["tokens"] in plain else None
        peak = row.get("peak_bytes")
        lines.append([
            _method(row),
            f"{row['tokens']:,}", f"{row['seconds']:.3f}",
            f"{of_plain:.2f}x" if of_plain else "", f"{row['tokens_per_second']:,.0f}",
            f"{row['utilisation']:.0%}", *(f"{row['phases'][phase]:.3f}" for phase in phases),
            f"{peak / 1e9:.1f}" if peak else "", f"{row['optimizer_bytes'] / 1e9:.2f}",
        ])  # fmt: skip
    head = ["method", "tokens", "s/step", "of plain", "tokens/s", "MFU", *phases, "peak, GB",
            "optimizer, GB"]  # fmt: skip
    text = ("**Training steps** of a model in the LLaMA-2-7B configuration, bfloat16, activation "
            "checkpointing; MFU: FLOPs of a plain step, nothing recomputed, over the rate of large "
            "products")  # fmt: skip
    return [text, markdown(head, lines)]


def _method(row: Row) -> str:
    ratio = f" {row['ratio']:g}" if row["method"] in ("sculpt", "osf") else ""
    return f"{row['method']}{ratio}"


def _continual(content: Row) -> list[str]:
    lines = [
        [row["variant"], f"{row['average_accuracy']:.3f}", f"{row['forgetting']:.3f}",
         f"{row['step_seconds'] or 0:.3f}", f"{row['trainable']:,}"]
        for row in sorted(content["continual"], key=lambda row: -row["average_accuracy"])
    ]  # fmt: skip
    head = ["method", "average accuracy", "forgetting", "s/step", "trained values"]
    return ["**Task order 1**", markdown(head, lines)]


def _parts(content: Row) -> list[str]:
    lines = [[name, part["state"], f"{part['seconds']:.1f}", f"{part['predicted']:.0f}"]
             for name, part in content["parts"].items()]  # fmt: skip
    return ["Seconds of each part", markdown(["part", "state", "s", "predicted"], lines, 2)]


def draw(path: Path) -> None:
    """One picture for each table that has one, beside the file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for key, (_, paint) in PICTURES.items():
        if content.get(key):
            _figure(path.with_name(f"{path.stem}-{key}.png"), paint, content)


def _figure(path: Path, paint: Callable[[Any, Row], None], content: Row) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from sculpt.storage.files import replacing_file

    figure = Figure(figsize=(11, 4.6), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    paint(figure, content)
    with replacing_file(path) as temporary:
        figure.savefig(temporary)


def _paint_kernels(figure: Any, content: Row) -> None:
    """Ratio to the best chain over r/k, one panel for each operation, one line for each matrix."""
    operations = [word for word in WORDS if any(r["case"].split()[0] == word
                                                for r in content["rows"])]  # fmt: skip
    axes = figure.subplots(1, len(operations), sharey=True, squeeze=False)[0]
    places = {ratio: i for i, ratio in enumerate(RATIOS)}
    for axis, operation in zip(axes, operations, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in content["rows"]:
            what, matrix, ratio = split_name(row["case"])
            if what == operation:
                lines.setdefault(matrix, []).append((places[ratio], best(row)[1]["ratio"]))
        for (matrix, points), color in zip(lines.items(), (OURS, THIRD, INK), strict=False):
            axis.plot(*zip(*sorted(points), strict=True), "o-", color=color, label=matrix)
        axis.axhline(1, color=THEIRS, linewidth=1)
        axis.set_xticks(range(len(RATIOS)), list(RATIOS), fontsize=8)
        axis.set_title(operation, fontsize=10)
        axis.legend(fontsize=6.5, frameon=False)
    axes[0].set_ylabel("time / best chain of torch")
    figure.supxlabel("removed rank / shorter side", fontsize=10)


def _paint_subspaces(figure: Any, content: Row) -> None:
    rows = content["subspaces"]
    matrices = list(dict.fromkeys(r["matrix"] for r in rows if r["method"] != "auto float64"))
    axes = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axis, matrix in zip(axes, matrices, strict=True):
        rows = [row for row in content["subspaces"] if row["matrix"] == matrix]
        rows.sort(key=lambda row: -row["seconds"])
        library = ("svd", "eigh")
        colors = [THEIRS if row["method"].startswith(library) else OURS for row in rows]
        axis.barh([row["method"] for row in rows], [row["seconds"] for row in rows], color=colors)
        axis.set_xscale("log")
        axis.set_title(matrix, fontsize=10)
        axis.set_xlabel("seconds")
        axis.tick_params(labelsize=8)


def _paint_training(figure: Any, content: Row) -> None:
    sizes = sorted({row["tokens"] for row in content["training"]})
    axes = figure.subplots(1, len(sizes), squeeze=False)[0]
    colors = {"forward": "#2f5d8a", "backward": "#7fa7cc", "optimizer": THIRD, "fold": OURS}
    for axis, tokens in zip(axes, sizes, strict=True):
        rows = [row for row in content["training"] if row["tokens"] == tokens][::-1]
        names = [_method(row) for row in rows]
        left = [0.0] * len(rows)
        for phase, color in colors.items():
            widths = [row["phases"][phase] for row in rows]
            axis.barh(names, widths, left=left, color=color, label=phase)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.set_title(f"{tokens:,} tokens a step", fontsize=10)
        axis.set_xlabel("seconds")
        axis.legend(fontsize=8, frameon=False)


PICTURES: dict[str, tuple[str, Callable[[Any, Row], None]]] = {
    "rows": ("Ratio to the best chain of torch over the rank", _paint_kernels),
    "subspaces": ("Seconds of each method", _paint_subspaces),
    "training": ("Seconds of a step by phase", _paint_training),
}
