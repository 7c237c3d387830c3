"""What can be learned through coordinates, beside projected dense steps and plain fine-tuning.

    python -m bench.engines            # the demo's encoder and tasks; minutes for each run

Each run is a process of its own and is kept at once, so the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from bench.training import about
from sculpt.storage.files import write_json

NAME = "engines-all-MiniLM-L6-v2.json"
WAYS = {
    "plain": ["--method", "plain"],
    "update": ["--engine", "update"],
    "compact, thin": ["--engine", "compact"],
    "compact, full": ["--engine", "compact", "--coordinates", "full"],
}
SEEDS = (0, 1, 2)


def learned(row: dict[str, Any]) -> float:
    """Mean accuracy on each task right after training on it."""
    return statistics.fmean(row["learned"])


def table(name: str, content: dict[str, Any]) -> str:
    """Markdown: engines down, means over seeds across, with the standard error of the mean."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in content["rows"]:
        groups[row["way"]].append(row)
    measures = {
        "learned": learned,
        "average accuracy": lambda row: row["average_accuracy"],
        "forgetting": lambda row: row["forgetting"],
    }
    lines = [
        "### What engines learn, all-MiniLM-L6-v2",
        "",
        f"`results/{name}`: {content['cpu']}, torch {content['torch']}, {content['date']}, "
        f"`{content['command']}`. Generated answers, {content['tests']} test texts for each of "
        "three tasks; means over seeds ± their standard error. *Learned*: accuracy on each task "
        "right after training on it.",
        "",
        f"| engine | seeds | {' | '.join(measures)} |",
        "| --- | ---: |" + " ---: |" * len(measures),
    ]
    for way, rows in groups.items():
        cells = [_mean([measure(row) for row in rows]) for measure in measures.values()]
        lines.append(f"| {way} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--tests", type=int, default=60, help="test texts for each task")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args(arguments)
    path = options.out / NAME
    content: dict[str, Any] = about() | {
        "command": "python -m bench.engines", "tests": options.tests, "rows": []
    }  # fmt: skip
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["tests"] != options.tests:
            raise SystemExit(
                f"{path} holds runs with {content['tests']} test texts, not {options.tests}"
            )
    rows: list[dict[str, Any]] = content["rows"]
    done = {(row["way"], row["seed"]) for row in rows}
    order = list(WAYS)
    for seed in options.seed:
        for way, choice in WAYS.items():
            if (way, seed) in done:
                continue
            command = [sys.executable, "bench/tune_demo.py", "--quick", *choice]
            command += ["--seed", str(seed), "--tests", str(options.tests)]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            row = {"way": way} | json.loads(run.stdout.splitlines()[-1])
            print(f"{way}, seed {seed}: learned {learned(row):.3f}", flush=True)
            rows.append(row)
            rows.sort(key=lambda row: (order.index(row["way"]), row["seed"]))
            write_json(path, content | about())
    print(table(path.name, content))


if __name__ == "__main__":
    main()
