"""Comparable budgets: how many values sculpt would train in each matrix, and what a method does."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sculpt.config import SculptConfig
from sculpt.task.engines import trained_elements
from sculpt.task.targets import Target

if TYPE_CHECKING:
    from sculpt.runs.method import Strategy


def lora_rank(target: Target, sculpt: SculptConfig) -> int:
    """Rank `r` whose `r (m + n)` factors come nearest to what sculpt trains, at least 1."""
    m, n = target.shape[-2:]
    return _nearest(trained_elements(target, sculpt) / (m + n), min(m, n))


def osf_rank(target: Target, sculpt: SculptConfig) -> int:
    """Trainable rank `t` whose factors and singular values, `t (m + n + 1)`, come nearest."""
    m, n = target.shape[-2:]
    # One direction at least must be preserved.
    return _nearest(trained_elements(target, sculpt) / (m + n + 1), min(m, n) - 1)


def _nearest(rank: float, most: int) -> int:
    return max(1, min(most, round(rank)))


def describe(strategy: Strategy) -> str:
    """One line: trained values of the matrices, beside those of sculpt; "" without `budget`."""
    config = strategy.config
    if config.budget != "match":
        return ""
    own = sum(strategy.cost(target).trained for target in strategy.targets)
    sculpt = sum(trained_elements(target, config.sculpt) for target in strategy.targets)
    line = f"{own:,} trained values, sculpt's are {sculpt:,} ({own / sculpt:.3g}x)"
    if own and not math.isclose(own, sculpt, rel_tol=0.1):
        line += ": not matched, " + (
            "whole matrices train" if own > sculpt else "ranks are whole numbers"
        )
    return line
