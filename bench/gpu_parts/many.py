"""Many matrices in one call against one by one."""

from __future__ import annotations

import torch

from bench import cases as C
from bench.gpu_parts.run import Run, random, row_of, short
from sculpt_kernels import project_many_


def part_many(run: Run) -> None:
    """The matrices of a model, or of four layers of a large one, in one call against one by one."""
    for ratio in run.ratios():
        run.attempt(_name(run, ratio), 8.0, _many, run, ratio)


def _name(run: Run, ratio: str) -> str:
    return f"many {len(_shapes(run))} matrices {ratio} bfloat16"


def _shapes(run: Run) -> list[tuple[int, int]]:
    """Of four layers of LLaMA-2-7B: an eighth of its 224 matrices."""
    square, wide, tall = (*run.shapes(), run.shapes()[0])[:3]
    return ([square] * 4 + [tall] * 2 + [wide]) * (1 if run.options.tiny else 4)


def _many(run: Run, ratio: str) -> None:
    if run.is_wrong("core"):
        raise ValueError("wrong result")
    found = run.measure([many_calls(run, ratio)], seconds=1.0)
    floor = sum(
        run.floor(C.Case("project", "core", shape, ratio, "bfloat16")) for shape in _shapes(run)
    )
    row = row_of(_name(run, ratio), found, floor)
    run.results["rows"].append(row)
    print(short(row), flush=True)


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
