"""What `bench.gpu` does, in order: what is worth most comes first, as far as it needs no other."""

from __future__ import annotations

from bench.checks import checks
from bench.gpu_parts.compile import part_compile
from bench.gpu_parts.continual import part_continual
from bench.gpu_parts.curvature import part_curvature
from bench.gpu_parts.graph import part_graph
from bench.gpu_parts.huge import part_huge
from bench.gpu_parts.kernels import (
    part_adamw,
    part_compiled,
    part_coordinates,
    part_many,
    part_project,
)
from bench.gpu_parts.run import Run
from bench.gpu_parts.schedule import Part
from bench.gpu_parts.subspaces import part_subspaces, part_svd
from bench.gpu_parts.training import part_training
from bench.timing import ceilings


def part_ceilings(run: Run) -> None:
    size, elements = (256, 2**20) if run.tiny else (8192, 2**28)
    rates = ceilings(run.device, size=size, elements=elements)
    run.results["rates"] = rates
    print({key: f"{rate:.3g}" for key, rate in rates.items()}, flush=True)


def part_checks(run: Run) -> None:
    for what, dtype, measure, limit in checks(run.device, run.tiny):
        run.attempt(f"check {what} {dtype}", 1.0, run.checked, what, measure, limit, dtype)
    found = run.results["checks"]
    print(f"checks: {sum(c['ok'] for c in found)} of {len(found)} passed", flush=True)


# Rates and correctness come first whatever else was asked for.
ALWAYS = ("ceilings", "checks")

# Predictions and limits, in seconds, are explained in README.md.
PARTS = {
    "ceilings": Part(part_ceilings, 10, 40),
    "compile": Part(part_compile, 40, 100),
    "checks": Part(part_checks, 15, 60),
    "graph": Part(part_graph, 10, 40),
    "project": Part(part_project, 45, 90),
    "adamw": Part(part_adamw, 30, 60),
    "many": Part(part_many, 15, 40),
    "coordinates": Part(part_coordinates, 45, 80),
    "training": Part(part_training, 165, 210),
    "curvature": Part(part_curvature, 25, 60),
    "subspaces": Part(part_subspaces, 45, 80),
    "svd": Part(part_svd, 40, 60),
    "huge": Part(part_huge, 25, 50),
    "compiled": Part(part_compiled, 60, 100),
    "continual": Part(part_continual, 300, 500),
}
