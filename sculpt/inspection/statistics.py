"""What it takes to protect a task: bytes and FLOPs of its statistics and of choosing directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sculpt.config import SculptConfig
from sculpt.curvature.collect import Pass, choose_kinds
from sculpt.curvature.directions import flops_of_ratio
from sculpt.curvature.memory import Memory
from sculpt.inspection.trace import counted
from sculpt.task.targets import Target


@dataclass(frozen=True)
class Statistics:
    """Of all targets.

    Attributes:
        factors: how many there are; sketches: how many of them are sketches.
        bytes: of the sums, kept from task to task; a second set is there while one is collected.
        peak: bytes on the device at the worst moment of the pass, weights and that set included.
        flops: of a pass over the tokens of one step.
        choice: FLOPs of choosing all directions by the ratio, once a task.
    """

    factors: int
    sketches: int
    bytes: int
    peak: int
    flops: int
    choice: int


def trace_statistics(
    model: nn.Module,
    targets: list[Target],
    config: SculptConfig,
    loss: Callable[[], Tensor],
    inputs: Iterable[Tensor],
) -> Statistics:
    """Collect them from a fake model, inside of a `FakeTensorMode`.

    Raises:
        ValueError: they do not fit `config.factor_bytes`.
    """
    kinds = choose_kinds(targets, config, Memory(), torch.device("cpu"))
    made = Pass(targets, kinds, Memory(), config.sketch_rank)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with made.on(model), counted(model, inputs) as (counter, live):
        loss().backward()  # type: ignore[no-untyped-call]
        flops, peak = counter.get_total_flops(), live.peak
    chosen: dict[tuple[str, int], int] = {}
    for target in targets:
        keys = made.memory.sides[target.name] if made.memory.of(target.name) else None
        for key in () if keys is None else (keys.left, keys.right):
            factor, t = made.memory.factors[key], target.trainable_rank
            chosen[key, t] = flops_of_ratio(factor, t)
    factors = made.memory.factors.values()
    return Statistics(
        factors=len(factors),
        sketches=sum(factor.kind == "sketch" for factor in factors),
        bytes=sum(t.nbytes for factor in factors for t in factor.tensors().values()),
        peak=weights + peak,
        flops=flops,
        choice=sum(chosen.values()),
    )
