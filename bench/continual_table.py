"""The table of runs of `bench.continual`: one for each model."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.markdown import markdown

Run = dict[str, Any]


def runs_in(folder: Path) -> list[Run]:
    """All runs that have a file; those that searched for a learning rate are marked so."""
    paths = sorted((*folder.glob("run-*.json"), *folder.glob("search-*.json")))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def by_variant(runs: list[Run]) -> dict[str, list[Run]]:
    """Best average accuracy first."""
    found = defaultdict(list)
    for run in runs:
        found[run["variant"]].append(run)
    return dict(sorted(found.items(), key=lambda item: -mean(item[1], accuracy)))


def mean(runs: list[Run], value: Callable[[Run], float]) -> float:
    return statistics.fmean(value(run) for run in runs)


def accuracy(run: Run, answers: str = "generated", metric: str = "average_accuracy") -> float:
    found = run["metrics"][answers][metric]
    return float("nan") if found is None else float(found)


def held(run: Run) -> float:
    """MiB beside weights and gradients."""
    return float(run["held_bytes"] + run["optimizer_state_bytes"]) / 2**20


def shared(run: Run) -> bool:
    """Whether others computed beside it, so that its seconds tell nothing."""
    return max(run["load"]) > run["machine"]["threads"] + 0.5


def sequences(runs: list[Run]) -> str:
    """Markdown; "" where there is no run."""
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
    plain = [run for run in done if run["variant"] == "plain"]
    text = (
        f"{len(done)} runs (`bench/results/continual/`, {first['machine']['cpu']}, "
        f"{first['machine']['threads']} thread(s), torch {first['versions'].get('torch')}, {dates})"
        f": {training.get('steps')} steps of {training['batch_size']} rows for each task "
        f"(train/test rows {rows}), passages of at most {training.get('max_text_tokens')} tokens"
        + (", prompts without instruction and options" if first["short_prompts"] else "")
        + f". Generated answers; orders {', '.join(orders)}, seeds {', '.join(seeds)}; means and "
        "standard deviations over runs. *Over plain*: the mean difference to plain in the same "
        "order and seed, its standard error, and how many such pairs there are."
    )
    if any(map(shared, done)):
        text += (
            " **Other programs ran on the machine at the same time, so its seconds are no "
            "measurement of time**: they are there for the record only."
        )
    lines = [
        [
            variant,
            ", ".join(sorted({f"{run['config']['training']['lr']:g}" for run in mine}))
            if mine[0]["trainable_elements"]
            else "",
            *(_cell([run for run in mine if run["order"] == order]) for order in orders),
            f"**{mean(mine, accuracy):.3f}**{_spread(mine)}",
            _over(mine, plain),
            f"{mean(mine, lambda run: accuracy(run, 'among_labels')):.3f}",
            f"{mean(mine, lambda run: accuracy(run, metric='forgetting')):.3f}",
            f"{mine[0]['trainable_elements']:,}",
            f"{mean(mine, held):,.1f}",
            f"{mean(mine, lambda run: run['peak_memory_bytes'] / 2**20):,.0f}",
            _seconds(mine),
            f"{mean(mine, lambda run: run['total_seconds']):,.0f}",
            str(len(mine)),
        ]
        for variant, mine in by_variant(done).items()
    ]
    head = ["method", "lr", *(f"order {order}" for order in orders), "average accuracy",
            "over plain", "among labels", "forgetting", "trained values", "held, MiB",
            "peak, MiB", "s / step", "s / run", "runs"]  # fmt: skip
    parts = [f"### Task sequences, {first['model']}", text, markdown(head, lines)]
    return "\n\n".join(parts + _searches([run for run in runs if run["search"]]))


def _searches(runs: list[Run]) -> list[str]:
    if not runs:
        return []
    tried = sorted({run["config"]["training"]["lr"] for run in runs})
    lines = []
    for variant, mine in by_variant(runs).items():
        scores = {run["config"]["training"]["lr"]: f"{accuracy(run):.3f}" for run in mine}
        best = max(scores.values())
        cells = [scores.get(lr, "") for lr in tried]
        lines.append([variant, *(f"**{cell}**" if cell == best else cell for cell in cells)])
    return [
        f"Average accuracy by learning rate, order {runs[0]['order']}, tested on held-out training "
        "rows with another seed; the best is the one above.",
        markdown(["method", *(f"{lr:g}" for lr in tried)], lines),
    ]


def _cell(runs: list[Run]) -> str:
    """Mean, and the spread over seeds where there are several."""
    return f"{mean(runs, accuracy):.3f}{_spread(runs)}" if runs else ""


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


def _seconds(runs: list[Run]) -> str:
    value = mean(runs, lambda run: run["step_seconds"] or float("nan"))
    return "" if value != value else f"{value:.2f}"
