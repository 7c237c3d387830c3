"""From the importance of layers to their preserved ranks, under one budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sculpt.adaptive.config import AdaptiveRanks
from sculpt.adaptive.importance import Importance, importance_of, squared_values
from sculpt.config import SculptConfig
from sculpt.curvature.costs import Costs
from sculpt.curvature.memory import Memory
from sculpt.distributed.processes import Processes
from sculpt.distributed.sharding import whole
from sculpt.task.cost import cost_of, trained_elements
from sculpt.task.ranks import floor_inside, pattern_rank
from sculpt.task.targets import Target
from sculpt_kernels import is_divided

TOLERANCE = 0.01
"""By which a budget may lie outside of what layers can take."""


def adapt(
    model: nn.Module,
    targets: list[Target],
    config: SculptConfig,
    calibration: Any,
    processes: Processes,
    memory: Memory,
) -> tuple[list[Target], dict[str, Importance]]:
    """Targets with the ranks that `config.ranks` gives them, and the scaled importance of each.

    memory: what is protected, where the bases come from it; empty otherwise.
    Layers that `rank_pattern` names keep what it says. A layer that could not be measured counts as
    one of mean importance, which is the uniform rank where there is no budget.

    Raises:
        TypeError, ValueError: the calibration data cannot be used, or the budget cannot be met.
    """
    ranks = config.ranks
    if ranks is None:
        if calibration is not None:
            raise ValueError("calibration is not used by uniform ranks; pass calibration=None")
        return targets, {}
    by_curvature = ranks.importance == "curvature" or (ranks.importance == "auto" and memory)
    free = [t for t in targets if pattern_rank(t.name, min(t.shape[-2:]), config) is None]
    if by_curvature:
        chosen, scaled = _by_curvature(targets, free, config, ranks, memory)
    else:
        chosen, scaled = _by_importance(model, targets, free, config, calibration, processes)
    processes.require_equal({"rank": {target.name: target.preserved for target in chosen}})
    named = {target.name for target in targets} - {target.name for target in free}
    return chosen, scaled | {name: Importance(None, "rank_pattern") for name in named}


def _by_importance(
    model: nn.Module,
    targets: list[Target],
    free: list[Target],
    config: SculptConfig,
    calibration: Any,
    processes: Processes,
) -> tuple[list[Target], dict[str, Importance]]:
    """Ranks by a measure of each layer that calibration data give."""
    ranks = config.ranks
    assert ranks is not None
    divided = next((t.name for t in targets if is_divided(t.parameter)), None)
    if divided is not None and ranks.importance == "fisher":
        raise ValueError(
            "importance='fisher' needs gradients of whole matrices, and that of "
            f"{divided!r} is divided by fully_shard: take importance='cosine', or run "
            "begin_task() once before fully_shard and pass its ranks as rank_pattern"
        )
    if calibration is None:
        raise ValueError(
            f"ranks with importance={ranks.importance!r} need data of the task before (or of the "
            "first task): begin_task(calibration=batches)"
        )
    preserved = [target.preserved for target in free]
    raw = importance_of(model, free, ranks.importance, preserved, calibration, processes)
    scaled = scale(raw)
    return _under_budget(targets, config, ranks, scaled), scaled


def _by_curvature(
    targets: list[Target],
    free: list[Target],
    config: SculptConfig,
    ranks: AdaptiveRanks,
    memory: Memory,
) -> tuple[list[Target], dict[str, Importance]]:
    """Ranks that train a budget of numbers where the curvature of what is protected is least."""
    reached = {target.name: target for target in free if memory.of(target.name) is not None}
    note = "no row that is protected has reached it: retains trr"
    scaled = {t.name: Importance(None, note, "curvature") for t in free}
    scaled |= scale({n: Importance(memory.curvature(n), by="curvature") for n in reached})
    uniform = [
        replace(t, preserved=preserved_rank(min(t.shape[-2:]), 1.0, ranks)) if t in free else t
        for t in targets
    ]
    if not reached:
        return _under_budget(targets, config, ranks, scaled), scaled
    costs = {name: Costs.of(memory, t, config, ranks.mrr) for name, t in reached.items()}

    def ranked(threshold: float) -> list[Target]:
        return [
            replace(t, preserved=costs[t.name].preserved(threshold)) if t.name in costs else t
            for t in uniform
        ]

    def energy(chosen: list[Target]) -> float:
        touched = (costs[t.name].touched(t) for t in chosen if t.name in costs)
        return 1 - math.fsum(touched) / math.fsum(cost.whole for cost in costs.values())

    default = "trainable_elements" if config.chosen_engine == "compact" else "protected_energy"
    name, wanted = ranks.budget or (default, 0)
    spent = energy if name == "protected_energy" else _spending(name, targets, config)
    budget = (name, wanted if ranks.budget else spent(uniform))
    ends = [cost.ends for cost in costs.values()]
    low, high = min(end[0] for end in ends) - 1, max(end[1] for end in ends) + 1
    return _met(budget, targets, spent, ranked, low, high), scaled


def scale(raw: dict[str, Importance]) -> dict[str, Importance]:
    """To a mean of 1 over the layers that were measured; the others are of mean importance."""
    values = [item.value for item in raw.values() if item.value is not None]
    mean = math.fsum(values) / len(values) if values else 0.0
    scaled = {}
    for name, item in raw.items():
        if item.value is None:
            scaled[name] = replace(item, note=f"{item.note}: as if of mean importance")
        elif mean == 0.0:
            scaled[name] = replace(item, value=None, note="no layer has any importance: all alike")
        else:
            scaled[name] = replace(item, value=item.value / mean)
    return scaled


def preserved_rank(k: int, importance: float, ranks: AdaptiveRanks, shift: float = 0.0) -> int:
    """`floor(k (mrr + importance (trr - mrr) + shift))` within `1 ... k - 1`."""
    retained = min(1.0, ranks.mrr + importance * (ranks.trr - ranks.mrr))
    return floor_inside((retained + shift) * k, k)


def _under_budget(
    targets: list[Target],
    config: SculptConfig,
    ranks: AdaptiveRanks,
    scaled: dict[str, Importance],
) -> list[Target]:
    """The targets with their ranks; `shift` is 0 without a budget, and found with one."""

    def ranked(shift: float) -> list[Target]:
        return [
            replace(target, preserved=_rank(target, scaled[target.name], ranks, shift))
            if target.name in scaled
            else target
            for target in targets
        ]

    budget = ranks.budget
    if budget is None:
        return ranked(0.0)
    return _met(budget, targets, _spending(budget[0], targets, config), ranked, -1.0, 1.0)


def _met(
    budget: tuple[str, float],
    targets: list[Target],
    spent: Callable[[list[Target]], float],
    ranked: Callable[[float], list[Target]],
    low: float,
    high: float,
) -> list[Target]:
    """The ranks that meet a budget, of those between `ranked(low)` and `ranked(high)`.

    `ranked` gives more preserved directions where its argument is larger.

    Raises:
        ValueError: none of them does.
    """
    name, wanted = budget
    least, most = sorted((spent(ranked(low)), spent(ranked(high))))
    if name == "trainable_elements" and isinstance(wanted, float) and wanted < 1:
        wanted *= sum(target.parameter.numel() for target in targets)
    # What is spent falls with the retained fractions, but for the energy, which rises.
    sign = 1 if name == "protected_energy" else -1
    for _ in range(60):
        middle = (low + high) / 2
        if sign * spent(ranked(middle)) < sign * wanted:
            low = middle
        else:
            high = middle
    best = _between(ranked(low), ranked(high), spent, wanted)
    inside = least <= wanted <= most  # and then it is met to one direction of a layer
    if not inside and abs(spent(best) - wanted) > TOLERANCE * wanted:
        raise ValueError(
            f"ranks.{name}={budget[1]} cannot be met to {TOLERANCE:.0%}: the nearest is "
            f"{spent(best):,.6g}; in these layers it goes from {least:,.6g} to {most:,.6g}"
        )
    return best


def _rank(target: Target, item: Importance, ranks: AdaptiveRanks, shift: float) -> int:
    value = 1.0 if item.value is None else item.value
    return preserved_rank(min(target.shape[-2:]), value, ranks, shift)


def _between(
    one: list[Target], other: list[Target], spent: Callable[[list[Target]], float], wanted: float
) -> list[Target]:
    """The nearest to `wanted` on the way from one to the other, a direction of a layer at a time.

    Layers of the same importance jump together, further than a budget of 1 % may allow.
    """
    best, now = one, list(one)
    for index, last in enumerate(other):
        while now[index].preserved < last.preserved:
            now[index] = replace(now[index], preserved=now[index].preserved + 1)
            if abs(spent(now) - wanted) < abs(spent(best) - wanted):
                best = list(now)
    return best


def _spending(
    name: str, targets: list[Target], config: SculptConfig
) -> Callable[[list[Target]], float]:
    """What targets with their ranks cost, in the unit of the budget."""
    if name == "protected_energy":
        return _energy(targets)
    if config.chosen_engine != "compact":
        raise ValueError(
            f"ranks.{name} needs engine='compact', where it depends on the ranks; "
            f"got engine={config.chosen_engine!r}"
        )
    if name == "trainable_elements":
        return lambda ranked: sum(trained_elements(target, config) for target in ranked)
    return lambda ranked: sum(_bytes(target, config) for target in ranked)


def _bytes(target: Target, config: SculptConfig) -> int:
    """Bases, coordinates, those in the weight, gradients and two moments; not the original."""
    cost = cost_of(target, replace(config, originals="cpu"))
    return cost.held - cost.weights


def _energy(targets: list[Target]) -> Callable[[list[Target]], float]:
    kept: dict[str, list[float]] = {}
    for target in targets:
        W = whole(target.parameter.detach())
        if not bool(torch.isfinite(W).all()):
            raise ValueError(f"the weight of {target.name!r} is not finite")
        squares = squared_values(target.oriented(W))
        squares = squares.reshape(-1, squares.shape[-1]).sum(0)
        kept[target.name] = squares.cumsum(0).tolist()
    total = math.fsum(sums[-1] for sums in kept.values()) or 1.0
    return lambda ranked: math.fsum(kept[t.name][t.preserved - 1] for t in ranked) / total
