"""What it costs earlier tasks to train one more direction of a layer, by their curvature."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from sculpt.config import SculptConfig
from sculpt.curvature.directions import trailing_shares
from sculpt.curvature.memory import Memory
from sculpt.task.targets import Target


@dataclass(frozen=True)
class Costs:
    """Of one target `(..., m, n)`, `k = min(m, n)`.

    Attributes:
        whole: `tr S tr A`.
        shares: of it in what trains with `t = 1, 2, ...` directions, `(k - 1,)`: the trailing
            directions of both sides, or under the core constraint all but the leading ones of both.
        slopes: logarithm of what the direction `t` adds to it for each number that it trains,
            never falling, for all that may train.
    """

    whole: float
    shares: Tensor
    slopes: Tensor

    @classmethod
    def of(cls, memory: Memory, target: Target, config: SculptConfig, least: float) -> Self:
        """Of a target that was reached, at least the fraction `least` of which is preserved."""
        *stack, m, n = target.shape
        keys = memory.sides[target.name]
        left, right = (trailing_shares(memory.factors[key]) for key in (keys.left, keys.right))
        t = torch.arange(1, min(m, n), device=left.device)
        h = min(m, n) - t
        thin = config.chosen_engine == "compact" and config.coordinates == "thin"
        p, q = (t, t) if thin else (m - h, n - h)
        a, b = left[p - 1], right[q - 1]
        strict = config.constraint == "strict"
        shares = a * b if strict else 1 - (1 - a) * (1 - b)
        numbers = math.prod(stack) * (p * q if strict else m * n - h * h)
        whole = memory.curvature(target.name)
        added, more = (torch.diff(x, prepend=x.new_zeros(1)) for x in (whole * shares, numbers))
        slopes = (added / more).clamp_min(torch.finfo(a.dtype).tiny).log().cummax(0).values
        slopes = slopes[: max(1, len(t) + 1 - math.ceil(least * (len(t) + 1)))]
        return cls(whole, shares.cpu(), slopes.cpu())

    @property
    def ends(self) -> tuple[float, float]:
        """The thresholds below which all directions train that may, and above which one does."""
        return -float(self.slopes[-1]), -float(self.slopes[0])

    def preserved(self, threshold: float) -> int:
        """Directions that are preserved where none trains that costs more than `exp(-threshold)`.

        All but one at most.
        """
        trains = int((self.slopes <= -threshold).sum())
        return len(self.shares) + 1 - max(1, trains)

    def touched(self, target: Target) -> float:
        """What the trainable directions of a target with its rank hold of `whole`."""
        return self.whole * float(self.shares[target.trainable_rank - 1])
