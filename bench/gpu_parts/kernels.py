"""Operations on matrices of LLaMA-2-7B: ours against the lines of torch that do the same."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench import cases as C
from bench.checks import random
from bench.gpu_parts.run import Run, row_of, variant_sets
from sculpt_kernels import project_many_

DTYPE = "bfloat16"


def cases(run: Run, part: str) -> Iterator[C.Case]:
    """Of a part; the forms other than `core` on one shape alone."""
    if part == "project":
        for form in ("core", "strict", "left"):
            for shape in run.shapes[: 3 if form == "core" else 1]:
                for ratio in run.ratios:
                    yield C.Case("project", form, shape, ratio, DTYPE)
        return
    for operation in ("adamw",) if part == "adamw" else ("compress", "expand_add"):
        for shape in run.shapes:
            for ratio in run.ratios:
                yield C.Case(operation, "core", shape, ratio, DTYPE)


def part_project(run: Run) -> None:
    for case in cases(run, "project"):
        run.time_case(case)


def part_adamw(run: Run) -> None:
    for case in cases(run, "adamw"):
        run.time_case(case)


def part_coordinates(run: Run) -> None:
    for case in cases(run, "coordinates"):
        run.time_case(case)


def part_compiled(run: Run) -> None:
    """`torch.compile` of the reference beside the chain and ours, as called from Python.

    At ranks where the device is busy long enough to hide the calls; compiling costs too much time
    for all of them.
    """
    for operation in ("project", "adamw"):
        for shape in run.shapes[:2]:
            for ratio in run.ratios[1::2]:
                case = C.Case(operation, "core", shape, ratio, DTYPE)
                run.attempt(f"{case.name} compiled", 20.0, _compiled, run, case)


def _compiled(run: Run, case: C.Case) -> None:
    sets = variant_sets(case, run.device, run.tiny, compiled=True)
    kept = ("chain", "compiled", "ours", "ours, gradient", "ours, update")
    found = run.called([{k: v for k, v in one.items() if k in kept} for one in sets])
    run.add("compiled", row_of(case.name, found, run.floor(case)))


def part_many(run: Run) -> None:
    """The matrices of a model, or of four layers of a large one, in one call and one by one."""
    for ratio in run.ratios:
        name = f"many {len(_shapes(run))} matrices {ratio} bfloat16"
        run.attempt(name, 8.0, _many, run, ratio, name)


def _shapes(run: Run) -> list[tuple[int, int]]:
    """Of four layers of LLaMA-2-7B: an eighth of its 224 matrices."""
    square, wide, tall = (*run.shapes, run.shapes[0])[:3]
    return ([square] * 4 + [tall] * 2 + [wide]) * (1 if run.tiny else 4)


def _many(run: Run, ratio: str, name: str) -> None:
    if run.is_wrong("core"):
        raise ValueError("wrong result")
    found = run.measure([many_calls(run, ratio)], seconds=1.0)
    each = (C.Case("project", "core", shape, ratio, DTYPE) for shape in _shapes(run))
    run.add("rows", row_of(name, found, sum(map(run.floor, each))))


def many_calls(run: Run, ratio: str) -> C.Variants:
    shapes = _shapes(run)
    rank = max(1, round(C.RATIOS[ratio] * min(shapes[0])))
    Gs = [random(run.device, *shape, dtype=torch.bfloat16) for shape in shapes]
    bases = {size: random(run.device, size, rank, dtype=torch.bfloat16, basis=True)
             for size in {x for shape in shapes for x in shape}}  # fmt: skip
    Us, Vs = [bases[m].clone() for m, _ in shapes], [bases[n].clone() for _, n in shapes]

    def naive() -> None:
        for G, U, V in zip(Gs, Us, Vs, strict=True):
            G.sub_(U @ (U.T @ G @ V) @ V.T)

    def chain() -> None:
        for G, U, V in zip(Gs, Us, Vs, strict=True):
            G.addmm_(U @ (U.T @ (G @ V)), V.T, alpha=-1)

    return {"naive": naive, "chain": chain, "ours": lambda: project_many_(Gs, Us, Vs)}
