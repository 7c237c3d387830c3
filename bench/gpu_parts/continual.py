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
    from bench.continual import VARIANTS, Plan

    options = run.options
    if not run.tiny and not (options.model and options.data):
        run.skip("continual", "--model and --data name no directories")
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        base: dict[str, Any] = {
            "model": str(tiny_model(work / "model") if run.tiny else options.model),
            "checkpoint.models": "none",
            "checkpoint.keep": 0,
            "device": run.device.type,
            "dtype": "bfloat16" if run.device.type == "cuda" else "float32",
            "data.skip_bad_rows": True,
            "data.test_rows": 4 if run.tiny else 60,
            "training.steps": 2 if run.tiny else 40,
            "training.batch_size": 4 if run.tiny else 8,
            "training.max_text_tokens": 128,
        }
        data = tiny_data(work / "data") if run.tiny else options.data
        for variant, changes in VARIANTS.items():
            plan = Plan(variant, "1", 0, changes | {"training.lr": RATES.get(variant, 1e-5)})
            seconds = 2.0 if run.tiny else NEEDED
            given = (run, plan, base, data, work / variant)
            run.attempt(f"continual {variant}", seconds, _measure, *given)


def _measure(run: Run, plan: Any, base: dict[str, Any], data: Path, out: Path) -> None:
    from bench.continual import describe, run_config
    from sculpt.runs.start import run as train

    cuda = run.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    config = run_config(plan, base, data, out)
    found = describe(config, train(config))
    if cuda:
        found["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    facts = {"variant": plan.variant, "order": "1", "seed": 0, "search": False, "load": [0.0],
             "short_prompts": False, "date": run.results["date"],
             "machine": {"cpu": run.results["device"], "threads": 1}}  # fmt: skip
    run.add("continual", facts | found)
