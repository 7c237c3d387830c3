"""One operation on one matrix of LLaMA-2-7B: ours against the lines of torch that do the same."""

from __future__ import annotations

from collections.abc import Iterator

from bench import cases as C
from bench.gpu_parts.run import Run, row_of, short, variant_sets

MODEL = "LLaMA-2-7B"
DTYPE = "bfloat16"


def project_cases(run: Run) -> Iterator[C.Case]:
    """All shapes for `core`, one for the other forms."""
    for form in ("core", "strict", "left"):
        for shape in run.shapes()[: 3 if form == "core" else 1]:
            for ratio in run.ratios():
                yield C.Case("project", form, shape, ratio, DTYPE, MODEL)


def adamw_cases(run: Run) -> Iterator[C.Case]:
    for shape in run.shapes():
        for ratio in run.ratios():
            yield C.Case("adamw", "core", shape, ratio, DTYPE, MODEL)


def coordinate_cases(run: Run) -> Iterator[C.Case]:
    for operation in ("compress", "expand_add"):
        for shape in run.shapes():
            for ratio in run.ratios():
                yield C.Case(operation, "core", shape, ratio, DTYPE, MODEL)


def part_project(run: Run) -> None:
    for case in project_cases(run):
        run.timed(case)


def part_adamw(run: Run) -> None:
    for case in adamw_cases(run):
        run.timed(case)


def part_coordinates(run: Run) -> None:
    for case in coordinate_cases(run):
        run.timed(case)


def part_compiled(run: Run) -> None:
    """`torch.compile` of the reference beside the chain and ours, as called from Python.

    At ranks where the device is busy long enough to hide the calls; compiling costs too much time
    for all of them.
    """
    for operation in ("project", "adamw"):
        for shape in run.shapes()[:2]:
            for ratio in run.ratios()[1::2]:
                case = C.Case(operation, "core", shape, ratio, DTYPE, MODEL)
                name = f"{case.name} compiled"
                run.attempt(name, 20.0, _compiled, run, case)


def _compiled(run: Run, case: C.Case) -> None:
    sets = variant_sets(case, run.device, run.options.tiny, compiled=True)
    kept = ("chain", "compiled", "ours", "ours, gradient", "ours, update")
    found = run.called([{k: v for k, v in one.items() if k in kept} for one in sets])
    row = row_of(case.name, found, run.floor(case))
    run.results["compiled"].append(row)
    print(short(row), flush=True)
