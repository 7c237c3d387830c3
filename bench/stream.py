"""Fifteen small tasks in a row with `protect="accumulate"`: the forecast, and what then happens.

A network with two hidden layers imitates, task by task, teachers that differ from its first weights
by a change of rank 2 in each layer, with AdamW. After every task: directions taken, the forecast,
and the worst share of the task's `ΔW` in the subspaces in which any earlier task learned; at the
end the mean loss on all tasks, beside `protect="redecompose"`.

    python -m bench.stream --out bench/results      # about a minute
"""

from __future__ import annotations

import argparse
import copy
import statistics
import warnings
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sculpt import SculptConfig, Sculptor
from sculpt.storage.files import write_json

FILE = "stream-small-tasks.json"
TASKS, WIDTH, STEPS = 15, 128, 150


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args(arguments)
    ways: list[dict[str, Any]] = [
        {"protect": "accumulate", "learned_energy": 0.9, "when_full": "freeze"},
        {"protect": "accumulate", "learned_energy": 0.9, "when_full": "release"},
        {"protect": "accumulate", "learned_energy": 0.5, "when_full": "freeze"},
        {"protect": "redecompose"},
    ]
    rows = [stream(**way) for way in ways]
    content = {"date": date.today().isoformat(), "torch": torch.__version__, "rows": rows}
    write_json(options.out / FILE, content)
    print(table(FILE, content))
    return 0


def student() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
    first, second, third = layers
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), third)


@cache
def teacher(task: int) -> nn.Sequential:
    """The first weights and a change of rank 2 in each layer, as large as a fifth of them."""
    model = student()
    generator = torch.Generator().manual_seed(100 + task)
    for layer in (model[0], model[2], model[4]):
        A, B = (torch.randn(WIDTH, 2, generator=generator) for _ in range(2))
        change = A @ B.mT
        weight = layer.weight.data
        weight.add_(change, alpha=0.2 * float(weight.norm() / change.norm()))
    return model.requires_grad_(False)


def batch(task: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10_000 * task + step)
    x = torch.randn(64, WIDTH, generator=generator)
    return x, teacher(task)(x)


def losses(model: nn.Module, tasks: int) -> list[float]:
    with torch.no_grad():
        pairs = (batch(task, 9_999) for task in range(tasks))
        return [float((model(x) - y).square().mean()) for x, y in pairs]


def stream(**config: Any) -> dict[str, Any]:
    model = student()
    sculptor = Sculptor(model, SculptConfig(unfreeze_rank_ratio=0.5, **config))
    untrained = statistics.fmean(losses(model, TASKS))
    after: list[dict[str, Any]] = []
    best = []
    for task in range(TASKS):
        before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
        learned = _learned(sculptor)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                sculptor.begin_task(name=str(task))
            except ValueError as error:
                after.append({"stopped": str(error).split(":")[0]})
                break
            _train(model, sculptor, task)
            sculptor.end_task()
        best.append(losses(model, task + 1)[-1])
        leak, share = 0.0, 0.0
        for name, (U, V) in learned.items():
            W = model.get_parameter(f"{name}.weight").detach().double()
            delta = W - before[f"{name}.weight"]
            norm = float(delta.norm())
            if norm > 0:
                found = max(float((U.mT @ delta).norm()), float((delta @ V).norm())) / norm
                floor = 2**-24 * float(W.norm()) / norm
                leak, share = max(leak, found), max(share, found / max(1e-6, 2 * floor))
        row: dict[str, Any] = {"leak": leak, "of_limit": share}
        if sculptor.learned is not None:
            capacity = sculptor.learned.capacity()
            row["taken"] = [room.uses[-1] for room in capacity.rooms.values()]
            row["free"] = [room.free for room in capacity.rooms.values()]
            row["forecast"] = capacity.tasks_left
        after.append(row)
    final = losses(model, len(best))
    return {
        "config": config,
        "untrained": untrained,
        "when_learned": statistics.fmean(best),
        "at_the_end": statistics.fmean(final),
        "tasks": after,
    }


def _learned(sculptor: Sculptor) -> dict[str, tuple[Tensor, Tensor]]:
    """What earlier tasks hold, by layer, orthonormal in float64."""
    if sculptor.learned is None:
        return {}
    found = {}
    for name, room in copy.copy(sculptor.learned.rooms).items():
        held = len(room.energies)
        sides = (torch.linalg.qr(B[:, :held].double()).Q for B in (room.U, room.V))
        found[name] = (next(sides), next(sides))
    return found


def _train(model: nn.Module, sculptor: Sculptor, task: int) -> None:
    optimizer = torch.optim.AdamW(sculptor.parameters(), lr=1e-4, weight_decay=0.0)
    sculptor.attach(optimizer)
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in range(STEPS):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / STEPS)
        x, y = batch(task, step)
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def table(name: str, content: dict[str, Any]) -> str:
    lines = [
        f"### Fifteen small tasks, `results/{name}`",
        "",
        f"Three layers of width {WIDTH}, half of each trains; {content['date']}, torch "
        f"{content['torch']}, `python -m bench.stream`. Directions and forecast (tasks until half "
        "of the layers are full) after tasks 1, 2, 4, 8 and 15; leak into all that earlier tasks "
        "learned (over the certificate's limit: below 1 is rounding); mean loss on all tasks.",
        "",
        "| protect | taken by the tasks, first layer | forecast | worst leak | loss before, "
        "when learned, at the end |",
        "| --- | --- | --- | ---: | --- |",
    ]
    for row in content["rows"]:
        config = row["config"]
        tasks = [task for task in row["tasks"] if "leak" in task]
        what = config["protect"]
        taken = forecast = leak = ""
        if what == "accumulate":
            what += f", energy {config['learned_energy']}, {config['when_full']}"
            taken = " ".join(str(task["taken"][0]) for task in tasks)
            shown = [(i, tasks[i - 1]["forecast"]) for i in (1, 2, 4, 8, 15) if i <= len(tasks)]
            forecast = ", ".join(f"{value:.1f} after {i}" for i, value in shown)
            leak = f"{max(task['leak'] for task in tasks):.0e}"
            leak += f" ({max(task['of_limit'] for task in tasks):.2f})"
            if len(tasks) < TASKS:
                forecast += f"; all layers full after {len(tasks)}"
        loss = " → ".join(f"{row[k]:.4f}" for k in ("untrained", "when_learned", "at_the_end"))
        lines.append(f"| {what} | {taken} | {forecast} | {leak} | {loss} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
