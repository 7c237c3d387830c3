"""Task order 1 by every method, on the model and the data that the call names.

All in one process, one after another: peak memory is what torch allocated on the device.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.gpu_parts.run import Run
from bench.rehearsal import tiny_data, tiny_model

# Seconds that must be left for one run.
NEEDED = 45.0
# Adapters move a weight less at the same rate.
RATES = {"lora": 1e-4, "osf": 1e-4, "olora": 1e-4}


def part_continual(run: Run) -> None:
    # Here, so that the other parts run where these need what is not installed.
    from bench.continual import VARIANTS

    tiny, options = run.options.tiny, run.options
    if not tiny and not (options.model and options.data):
        run.skip("continual", "--model and --data name no directories")
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = tiny_model(work / "model") if tiny else options.model
        data = tiny_data(work / "data") if tiny else options.data
        for variant, changes in VARIANTS.items():
            seconds = 2.0 if tiny else NEEDED
            given = (run, variant, changes, model, data, work / variant)
            run.attempt(f"continual {variant}", seconds, _measure, *given)


def _measure(
    run: Run, variant: str, changes: dict[str, Any], model: Path, data: Path, out: Path
) -> None:
    from bench.continual import Plan, run_config
    from sculpt.metrics import summary
    from sculpt.runs.start import run as train

    tiny, cuda = run.options.tiny, run.device.type == "cuda"
    base: dict[str, Any] = {
        "model": str(model),
        "checkpoint.models": "none",
        "checkpoint.keep": 0,
        "device": run.device.type,
        "dtype": "bfloat16" if cuda else "float32",
        "data.skip_bad_rows": True,
        "data.test_rows": 4 if tiny else 60,
        "training.steps": 2 if tiny else 40,
        "training.batch_size": 4 if tiny else 8,
        "training.lr": RATES.get(variant, 1e-5),
        "training.max_text_tokens": 128,
    }
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    config = run_config(Plan(variant, "1", 0, changes), base, data, out)
    found = train(config).methods[config.method]
    scores = summary(found.generated)
    row = {
        "variant": variant,
        "model": model.name,
        "generated": found.generated,
        "average_accuracy": scores.average_accuracy,
        "forgetting": scores.forgetting,
        "seconds": found.seconds,
        "step_seconds": found.step_seconds if found.step_seconds > 0 else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "trainable": found.trainable_elements,
        "held_bytes": found.held_bytes + found.optimizer_state_bytes,
    }
    run.results["continual"].append(row)
    print(line(row), flush=True)


def line(row: dict[str, Any]) -> str:
    peak = f"{row['peak_bytes'] / 1e9:.1f} GB" if row["peak_bytes"] else ""
    return (
        f"{row['variant']:12} accuracy {row['average_accuracy']:.3f} forgetting "
        f"{row['forgetting']:.3f} {row['step_seconds'] or 0:8.3f} s/step "
        f"{sum(row['seconds'].values()):7.1f} s  {row['trainable']:>13,} trained  {peak}"
    )


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines for the end of the script, best first."""
    return [line(row) for row in sorted(rows, key=lambda row: -row["average_accuracy"])]
