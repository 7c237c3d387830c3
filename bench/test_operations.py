"""pytest-benchmark suite of every operation, on the CPU or, where there is one, on the GPU.

    pytest bench/test_operations.py --benchmark-group-by=group
    pytest bench/test_operations.py -k "core and SmolLM2-135M" --benchmark-json=out.json

Groups hold the variants of one case: compare within a group. `bench.cpu` and `bench.gpu` interleave
the variants and are the source of published ratios; this suite is for tracking one's own changes.
"""

from __future__ import annotations

import functools

import pytest
import torch

from bench.cases import MODELS, OPERATIONS, RATIOS, Inputs, cases, floor, variants
from bench.timing import ceilings

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VARIANTS = {
    "project": ("naive", "chain", "compiled", "ours", "ours, complement"),
    "compress": ("naive", "chain", "compiled", "ours"),
    "expand_add": ("naive", "chain", "compiled", "ours", "ours, stochastic"),
    "adamw": ("AdamW alone", "naive", "chain", "compiled", "ours, gradient", "ours, update"),
}


def parameters():
    # LLaMA-2-7B on a CPU takes minutes a case: `python -m bench.cpu --models LLaMA-2-7B`.
    models = [name for name in MODELS if DEVICE.type == "cuda" or name != "LLaMA-2-7B"]
    for case in cases(models, OPERATIONS, ["float32", "bfloat16"], RATIOS):
        for variant in VARIANTS[case.operation]:
            name = f"{case.model}-{case.name}-{variant}".replace(" ", "-")
            yield pytest.param(case, variant, id=name)


@functools.lru_cache(maxsize=1)
def rates():
    gpu = DEVICE.type == "cuda"
    return ceilings(DEVICE, size=8192 if gpu else 1024, elements=2**28 if gpu else 2**25)


@functools.lru_cache(maxsize=1)
def inputs(case, compiled):
    return variants(Inputs(case, DEVICE, seed=0), compiled=compiled)


@pytest.mark.parametrize(("case", "variant"), parameters())
def test_operation(benchmark, case, variant):
    calls = inputs(case, variant == "compiled")
    if variant not in calls:
        pytest.skip("no such variant for this case")
    call = calls[variant]
    call()

    def run():
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)

    benchmark.group = f"{case.model} {case.name}"
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark(run)
    rate = rates().get(case.dtype, rates()["float32"])
    least = floor(case, "H100" if DEVICE.type == "cuda" else "cpu", rate, rates()["copy"])
    if benchmark.stats:
        benchmark.extra_info["roofline"] = least / benchmark.stats["median"]
