"""Ranks at which an adapter trains as many values of each matrix as sculpt would."""

from __future__ import annotations

from sculpt.config import SculptConfig
from sculpt.task.cost import trained_elements
from sculpt.task.targets import Target


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
