"""Try settings of the demo: one line of metrics for every method, ratio, learning rate and seed.

    python bench/tune_demo.py --quick --method sculpt --ratio 0.1 0.25 --lr 5e-5 1e-4 --seed 3 4 5

`docs/reference/demo.md` says which of them became the defaults, and why.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sculpt.demo.models import minilm, smollm2
from sculpt.demo.settings import QUICK, DemoSettings
from sculpt.metrics import summary
from sculpt.runs.methods import METHODS
from sculpt.runs.start import run


def measure(method: str, settings: DemoSettings, way: dict[str, str]) -> dict[str, Any]:
    """Train the sequence once in this process."""
    with tempfile.TemporaryDirectory() as out:
        settings = replace(settings, out=Path(out))
        config = settings.run_config(method, minilm() if settings.quick else smollm2())
        config = config.model_copy(update={"sculpt": replace(config.sculpt, **way)})
        result = run(config).methods[method]
    generated, among = summary(result.generated), summary(result.among_labels)
    return {
        "method": method,
        **(way if method == "sculpt" else {}),
        "ratio": settings.ratio if method == "sculpt" else None,
        "lr": settings.lr,
        "steps": settings.steps,
        "warmup_steps": settings.warmup_steps,
        "seed": settings.seed,
        "average_accuracy": round(generated.average_accuracy, 4),
        "forgetting": round(generated.forgetting, 4),
        "learned": [round(result.generated[i][i], 3) for i in range(len(result.generated))],
        "last": [round(value, 3) for value in result.generated[-1]],
        "average_accuracy_among_labels": round(among.average_accuracy, 4),
        "forgetting_among_labels": round(among.forgetting, 4),
        "step_seconds": round(result.step_seconds, 3),
        "seconds": {phase: round(value, 1) for phase, value in result.seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--method", choices=list(METHODS), nargs="+", default=["sculpt"])
    parser.add_argument("--engine", nargs="+", default=["compact"])
    parser.add_argument("--coordinates", nargs="+", default=["thin"])
    parser.add_argument("--ratio", type=float, nargs="+")
    parser.add_argument("--lr", type=float, nargs="+")
    parser.add_argument("--steps", type=int, nargs="+")
    parser.add_argument("--warmup", type=int, nargs="+")
    parser.add_argument("--seed", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--tests", type=int, help="test texts for each task")
    parser.add_argument("--threads", type=int)
    choices = parser.parse_args()
    if choices.threads:
        torch.set_num_threads(choices.threads)
    preset = DemoSettings(out=Path("unused"), **(QUICK if choices.quick else {}))
    for method, engine, coordinates, ratio, lr, steps, warmup, seed in itertools.product(
        choices.method,
        choices.engine,
        choices.coordinates,
        choices.ratio or [preset.ratio],
        choices.lr or [preset.lr],
        choices.steps or [preset.steps],
        choices.warmup or [preset.warmup_steps],
        choices.seed,
    ):
        settings = DemoSettings(
            out=preset.out,
            quick=choices.quick,
            seed=seed,
            ratio=ratio,
            steps=steps,
            lr=lr,
            warmup_steps=warmup,
            test_per_task=choices.tests or preset.test_per_task,
        )
        way = {"engine": engine, "coordinates": coordinates}
        print(json.dumps(measure(method, settings, way)), flush=True)


if __name__ == "__main__":
    main()
