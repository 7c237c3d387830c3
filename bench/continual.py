"""Task sequences by any method, side by side: what each learns, forgets, takes and holds.

    python -m bench.continual --model DIR --data DIR --orders 1 2 3 --seeds 0
    python -m bench.continual ... --search 2e-5 5e-5 1e-4   # first choose a learning rate for each
    python -m bench.continual ... --variant half sculpt.unfreeze_rank_ratio=0.5
    python -m bench.continual ... training.steps=40         # any field of a run, for all

Every run is a process of its own and leaves one JSON file. What has one is skipped, unless a search
has found another rate since, and what was interrupted is taken up where it was. A search trains and
tests on training rows only, on the first of the orders, and the rate with the best average accuracy
is the one for all orders.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.baselines import BASELINES
from bench.machine import about, today
from sculpt.data.folders import folder_tasks
from sculpt.metrics import summary
from sculpt.report.results import Results
from sculpt.runs.config import RunConfig
from sculpt.runs.state import MethodResult
from sculpt.storage.files import write_json

MATCHED = {"options.budget": "match"}
VARIANTS: dict[str, dict[str, Any]] = {
    "frozen": {"method": "frozen"},
    "plain": {"method": "plain"},
    "sculpt": {"method": "sculpt"},
    "sculpt core": {"method": "sculpt", "sculpt.constraint": "core"},
    "sculpt adaptive": {"method": "sculpt", "sculpt.ranks": {"mrr": 0.1, "trr": 0.8}},
    "sculpt weights": {"method": "sculpt", "sculpt.subspaces": "weights"},
    "lora": {"method": "lora", **MATCHED},
    "osf": {"method": "osf", **MATCHED},
    "olora": {"method": "olora", **MATCHED},
    "replay": {"method": "plain", "replay.rows": 32, "replay.share": 0.25},
    "ewc": {"method": "ewc"},
    "l2sp": {"method": "l2sp"},
    "multitask": {"method": "multitask"},
}
"""Names and what they change in a run: dotted fields of `RunConfig`, short names of methods."""

RESULTS = Path("bench/results/continual")


@dataclass(frozen=True)
class Plan:
    """One run: its variant, order and seed, and what is special about it."""

    variant: str
    order: str
    seed: int
    changes: dict[str, Any]
    search: bool = False

    def name(self, model: Path) -> str:
        lr = f"-lr-{self.changes['training.lr']:g}" if self.search else ""
        kind = "search" if self.search else "run"
        variant = self.variant.replace(" ", "-")
        return f"{kind}-{model.name}-order-{self.order}-{variant}-seed-{self.seed}{lr}"


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        *above, last = key.split(".")
        inner = found
        for part in above:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return found


def run_config(plan: Plan, base: dict[str, Any], data: Path, out: Path) -> RunConfig:
    """The run; `base` holds dotted fields for all."""
    values = {**base, **plan.changes, "seed": plan.seed, "out": str(out)}
    values["method"] = BASELINES.get(values["method"], values["method"])
    if plan.search:
        values["data.tasks"] = [
            {
                "name": task.name,
                "train": str(task.train),
                "labels": list(task.labels),
                "measure": task.measure,
            }
            for task in folder_tasks(data, plan.order)
        ]
    else:
        values |= {"data.folder": str(data), "data.order": plan.order}
    return RunConfig.model_validate(nested(values))


def compute(config: RunConfig, facts: dict[str, Any], path: Path, threads: int) -> None:
    """Run it in this process, and leave the file at `path`."""
    import torch

    from sculpt.runs.start import resume, run

    torch.set_num_threads(threads)
    before = os.getloadavg()[0]
    started = (config.out / "config.json").is_file()
    results = (resume(config.out) or finished(config)) if started else run(config)
    facts["load"] = [round(before, 2), round(os.getloadavg()[0], 2)]
    facts |= {"date": today(), "machine": about()}
    write_json(path, facts | describe(config, results))
    shutil.rmtree(config.out)


def finished(config: RunConfig) -> Results:
    """Of a run that was finished and left no file."""
    found = json.loads((config.out / "results.json").read_text(encoding="utf-8"))
    methods = {n: MethodResult.from_dict(v) for n, v in found["methods"].items()}
    return Results(found["config"], found["versions"], found["tasks"], methods)


def describe(config: RunConfig, results: Results) -> dict[str, Any]:
    """What one run leaves. Of paths only the last part."""
    result = results.methods[config.method]
    worst = result.worst_leak
    settings = config.model_dump(mode="json", exclude={"out", "model"}, exclude_none=True)
    settings["data"] = {k: v for k, v in settings["data"].items() if k not in ("tasks", "folder")}
    metrics = {name: vars(summary(getattr(result, name))) for name in ("generated", "among_labels")}
    return {
        "model": config.model.name,
        "config": settings,
        "tasks": [{k: task[k] for k in ("name", "train", "test")} for task in results.tasks],
        "generated": result.generated,
        "among_labels": result.among_labels,
        "metrics": metrics,
        "seconds": {name: round(value, 2) for name, value in result.seconds.items()},
        "step_seconds": result.step_seconds,
        "total_seconds": round(result.total_seconds, 2),
        "peak_memory_bytes": result.peak_memory_bytes,
        "optimizer_state_bytes": result.optimizer_state_bytes,
        "held_bytes": result.held_bytes,
        "trainable_elements": result.trainable_elements,
        "leak": None if worst is None else {"leak": worst.leak, "limit": worst.limit},
        "versions": results.versions,
    }


def in_a_process(config: RunConfig, facts: dict[str, Any], path: Path, threads: int) -> bool:
    """Whether the run went well; its peak memory is then that of nothing else."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=compute, args=(config, facts, path, threads))
    process.start()
    try:
        process.join()
    except BaseException:
        process.terminate()
        process.join()
        raise
    return process.exitcode == 0


def run_all(plans: Sequence[Plan], base: dict[str, Any], data: Path, options: Any) -> list[str]:
    """Do what is not done yet; the names of the runs that failed."""
    failed = []
    for number, plan in enumerate(plans, 1):
        name = plan.name(options.model)
        path = options.out / f"{name}.json"
        if done_at_this_rate(path, plan):
            continue
        print(f"{number} of {len(plans)}: {name}", flush=True)
        config = run_config(plan, {**base, "model": str(options.model)}, data, options.work / name)
        facts = {
            "variant": plan.variant,
            "order": plan.order,
            "seed": plan.seed,
            "search": plan.search,
            "short_prompts": options.short,
        }
        if in_a_process(config, facts, path, options.threads):
            got = json.loads(path.read_text(encoding="utf-8"))
            score = got["metrics"]["generated"]["average_accuracy"]
            print(f"  average accuracy {score:.3f}, {got['total_seconds']:.0f} s", flush=True)
        else:
            failed.append(name)
    return failed


def done_at_this_rate(path: Path, plan: Plan) -> bool:
    """Whether the run has its file, and no later search found another rate for it."""
    if not path.is_file():
        return False
    used = json.loads(path.read_text(encoding="utf-8"))["config"]["training"]["lr"]
    return bool(used == plan.changes.get("training.lr", used))


def searched(out: Path, model: Path) -> dict[str, float]:
    """The best rate of each variant that was searched, the lowest among equals."""
    best: dict[str, tuple[float, float]] = {}
    for path in out.glob(f"search-{model.name}-*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        score = found["metrics"]["generated"]["average_accuracy"]
        entry = (score, -found["config"]["training"]["lr"])
        best[found["variant"]] = max(best.get(found["variant"], entry), entry)
    return {variant: -lr for variant, (_, lr) in best.items()}


def shorten(data: Path, target: Path) -> Path:
    """A copy of the data sets whose prompts have no line of instruction and none of options.

    A sentence encoder answers with the nearest label, and neither reads nor needs them.
    """
    for source in sorted(data.glob("*/*.json")):
        rows = json.loads(source.read_text(encoding="utf-8"))
        if source.name != "labels.json":
            for row in rows:
                head, option, rest = row["prompt"].partition("\nOption:")
                if option:
                    row["prompt"] = rest.partition("\n")[2] or head
        write_json(target / source.parent.name / source.name, rows)
    return target


def value_of(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def fields(arguments: Sequence[str]) -> dict[str, Any]:
    """key=value arguments. Raises `ValueError` for anything else."""
    found = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not key or not equals:
            raise ValueError(
                f"argument {argument!r}: expected key=value, such as training.steps=40"
            )
        found[key] = value_of(text)
    return found


def plans_of(variants: dict[str, dict[str, Any]], options: Any) -> list[Plan]:
    """All runs at the rates that were found: an order after the other, then the next seed."""
    rates = {n: {"training.lr": lr} for n, lr in searched(options.out, options.model).items()}
    return [
        Plan(name, order, seed, {**changes, **rates.get(name, {})})
        for seed in options.seeds
        for order in options.orders
        for name, changes in variants.items()
    ]


def search_plans(variants: dict[str, dict[str, Any]], options: Any) -> list[Plan]:
    return [
        Plan(name, options.orders[0], 100, {**changes, "training.lr": lr}, search=True)
        for lr in options.search
        for name, changes in variants.items()
        if changes["method"] != "frozen"
    ]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("fields", nargs="*", help="key=value, any field of a run")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="a folder for each data set")
    parser.add_argument("--short", action="store_true", help="prompts without their options")
    parser.add_argument("--orders", nargs="+", default=["1", "2", "3"])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument(
        "--variant", nargs="+", action="append", default=[], help="NAME key=value ...: one more"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--search", nargs="+", type=float, default=[], help="learning rates")
    parser.add_argument("--only-search", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("runs/continual"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    base = {"checkpoint.models": "none", **fields(options.fields)}
    variants = {name: VARIANTS[name] for name in options.variants}
    for name, *changes in options.variant:
        variants[name] = {"method": "sculpt", **fields(changes)}
    data = options.data
    if options.short:
        data = shorten(data, options.work / f"short-{data.name}")
    failed = run_all(search_plans(variants, options), base, data, options)
    if not options.only_search:
        failed += run_all(plans_of(variants, options), base, data, options)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
