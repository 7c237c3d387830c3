"""One table and one picture of all runs of `bench.continual` that have a file."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

Run = dict[str, Any]


def read(folder: Path) -> list[Run]:
    """All runs; those that searched for a learning rate are marked so."""
    paths = sorted((*folder.glob("run-*.json"), *folder.glob("search-*.json")))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def shared(run: Run) -> bool:
    """Whether others computed beside it, so that its seconds tell nothing."""
    return max(run["load"]) > run["machine"]["threads"] + 0.5


def by_variant(runs: list[Run]) -> dict[str, list[Run]]:
    """Best average accuracy first."""
    found = defaultdict(list)
    for run in runs:
        found[run["variant"]].append(run)
    return dict(sorted(found.items(), key=lambda item: -_mean(item[1], accuracy)))


def accuracy(run: Run) -> float:
    return _value(run, "generated", "average_accuracy")


def forgetting(run: Run) -> float:
    return _value(run, "generated", "forgetting")


def rates(runs: list[Run]) -> str:
    used = sorted({run["config"]["training"]["lr"] for run in runs})
    return ", ".join(f"{lr:g}" for lr in used) if runs[0]["trainable_elements"] else ""


def among(run: Run) -> float:
    return _value(run, "among_labels", "average_accuracy")


def _value(run: Run, answers: str, metric: str) -> float:
    found = run["metrics"][answers][metric]
    return float("nan") if found is None else float(found)


def held(run: Run) -> float:
    """MiB beside weights and gradients."""
    return float(run["held_bytes"] + run["optimizer_state_bytes"]) / 2**20


def table(folder: Path) -> str:
    """Markdown, one table for each model; "" where there is no run."""
    runs = read(folder)
    models = dict.fromkeys(run["model"] for run in runs)
    return "\n\n".join(_of_model([run for run in runs if run["model"] == m]) for m in models)


def _of_model(runs: list[Run]) -> str:
    done = [run for run in runs if not run["search"]]
    if not done:
        return f"{runs[0]['model']}: only searched so far."
    first = done[0]
    orders = sorted({run["order"] for run in done})
    seeds = sorted({str(run["seed"]) for run in done})
    training = first["config"]["training"]
    rows = ", ".join(f"{task['name']} {task['train']}/{task['test']}" for task in first["tasks"])
    dates = " to ".join(dict.fromkeys((done[0]["date"], done[-1]["date"])))
    machine, steps = first["machine"], training.get("steps")
    parts = [
        f"### Task sequences, {first['model']}",
        f"`results/continual/run-{first['model']}-*.json`, {len(done)} runs, {machine['cpu']}, "
        f"{machine['threads']} thread(s), torch {first['versions'].get('torch')}, {dates}. "
        f"{steps} steps of {training['batch_size']} rows for each task (train/test rows "
        f"{rows}), passages of at most {training.get('max_text_tokens')} tokens"
        + (", prompts without instruction and options" if first["short_prompts"] else "")
        + f". Generated answers; orders {', '.join(orders)}, seeds {', '.join(seeds)}; means and "
        "standard deviations over runs. *Over plain*: the mean difference to plain in the same "
        "order and seed, its standard error, and how many such pairs there are.",
    ]
    if any(shared(run) for run in done):
        parts.append(
            "**Other programs ran on the machine at the same time, so its seconds are no "
            "measurement of time**: they are there for the record only."
        )
    header = ["method", "lr", *(f"order {order}" for order in orders), "average accuracy",
              "over plain", "among labels", "forgetting", "trained values", "held, MiB",
              "peak, MiB", "s / step", "s / run", "runs"]  # fmt: skip
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for variant, mine in by_variant(done).items():
        lines.append(
            [
                variant,
                rates(mine),
                *(_cell([run for run in mine if run["order"] == order]) for order in orders),
                f"**{_mean(mine, accuracy):.3f}**{_spread(mine)}",
                _over(mine, [run for run in done if run["variant"] == "plain"]),
                f"{_mean(mine, among):.3f}",
                f"{_mean(mine, forgetting):.3f}",
                f"{mine[0]['trainable_elements']:,}",
                f"{_mean(mine, held):,.1f}",
                f"{_mean(mine, lambda run: run['peak_memory_bytes'] / 2**20):,.0f}",
                _number(_mean(mine, lambda run: run["step_seconds"] or float("nan")), "{:.2f}"),
                f"{_mean(mine, lambda run: run['total_seconds']):,.0f}",
                str(len(mine)),
            ]
        )  # fmt: skip
    parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    notes = defaultdict(list)
    for variant, mine in by_variant(done).items():
        notes[mine[0].get("budget", "")].append(variant)
    notes.pop("", None)
    parts += [f"- {', '.join(names)}: {note}" for note, names in notes.items()]
    parts += _searches([run for run in runs if run["search"]])
    return "\n\n".join(parts)


def _searches(runs: list[Run]) -> list[str]:
    if not runs:
        return []
    tried = sorted({run["config"]["training"]["lr"] for run in runs})
    lines = [["method", *(f"{lr:g}" for lr in tried)], ["---"] + ["---:"] * len(tried)]
    for variant, mine in by_variant(runs).items():
        scores = {run["config"]["training"]["lr"]: accuracy(run) for run in mine}
        best = max(scores.values())
        cells = [f"{scores[lr]:.3f}" if lr in scores else "" for lr in tried]
        lines.append([variant, *(f"**{c}**" if c == f"{best:.3f}" else c for c in cells)])
    return [
        f"Average accuracy by learning rate, order {runs[0]['order']}, tested on held-out training "
        "rows with another seed; the best is the one above.",
        "\n".join("| " + " | ".join(line) + " |" for line in lines),
    ]


def _cell(runs: list[Run]) -> str:
    """Mean, and the spread over seeds where there are several."""
    return f"{_mean(runs, accuracy):.3f}{_spread(runs)}" if runs else ""


def _spread(runs: list[Run]) -> str:
    values = [accuracy(run) for run in runs]
    return f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""


def _over(runs: list[Run], plain: list[Run]) -> str:
    """Of pairs of the same order and seed: mean difference, its standard error, their number."""
    base = {(run["order"], run["seed"]): accuracy(run) for run in plain}
    pairs = [(run, base.get((run["order"], run["seed"]))) for run in runs if run not in plain]
    over = [accuracy(run) - other for run, other in pairs if other is not None]
    if not over:
        return ""
    error = f" ± {statistics.stdev(over) / len(over) ** 0.5:.3f}" if len(over) > 1 else ""
    return f"{statistics.fmean(over):+.3f}{error} ({len(over)})"


def _mean(runs: list[Run], value: Any) -> float:
    return statistics.fmean(value(run) for run in runs)


def _number(value: float, form: str) -> str:
    return "" if value != value else form.format(value)


def draw(folder: Path, path: Path) -> None:
    """Average accuracy against seconds of a run, and against what a method holds, into `path`."""
    runs = [run for run in read(folder) if not run["search"]]
    if not runs:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from sculpt.storage.files import replacing_file

    figure = Figure(figsize=(13, 4.6), dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    late = " (shared machine: no measurement)" if any(map(shared, runs)) else ""
    panels = (
        (f"seconds of a run{late}", lambda run: run["total_seconds"]),
        ("MiB held beside weights and gradients", held),
    )
    for axis, (title, value) in zip(figure.subplots(1, 2), panels, strict=True):
        points = [
            (variant, _mean(mine, value), _mean(mine, accuracy))
            for variant, mine in by_variant(runs).items()
        ]
        axis.margins(0.08)
        # Names beside the axis, in the order of their points, do not hide each other.
        for place, (variant, x, y) in enumerate(points):
            color = "#c2410c" if variant.startswith("sculpt") else "#475569"
            axis.scatter(x, y, s=40, color=color, zorder=3)
            axis.annotate(
                variant,
                (x, y),
                xytext=(1.03, 0.97 - 0.94 * place / max(1, len(points) - 1)),
                textcoords="axes fraction",
                color=color,
                va="center",
                arrowprops={"arrowstyle": "-", "color": color, "alpha": 0.35, "linewidth": 0.8},
            )
        axis.set_xlabel(title)
        axis.set_ylabel("average accuracy, generated answers")
        axis.grid(color="#e2e8f0")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    with replacing_file(path) as temporary:
        figure.savefig(temporary, metadata={"Software": None})
