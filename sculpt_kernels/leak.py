"""How much of an update lies where it must not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sculpt_kernels import checks, reference
from sculpt_kernels.operation import operation


@dataclass(frozen=True)
class Leak:
    """Shares of `‖Δ‖_F` inside the protected subspaces; the largest of a batch.

    Attributes:
        core: `‖UᵀΔV‖ / ‖Δ‖`, what the `core` constraint forbids.
        left: `‖UᵀΔ‖ / ‖Δ‖`; right: `‖ΔV‖ / ‖Δ‖`, what `strict` forbids.
    """

    core: float
    left: float
    right: float

    @property
    def strict(self) -> float:
        """The larger of the two sides."""
        return max(self.left, self.right)


@operation()
def leak(delta: Tensor, U: Tensor, V: Tensor) -> Leak:
    """Measure the leak of an update `delta` into the protected bases `U`, `V`, in float64.

    Args:
        delta: `(..., m, n)`, finite; a zero matrix leaks nothing.
        U: `(..., m, r)`; V: `(..., n, s)`: the *preserved* (`high`) bases, any floating dtype.

    Raises:
        TypeError, ValueError: an argument does not fit, or `delta` is not finite.
    """
    checks.sides(delta, U, V, "core", "none", "delta")
    checks.same_device(delta=delta, U=U, V=V)
    checks.finite("delta", delta)
    if delta.numel() == 0:
        return Leak(0.0, 0.0, 0.0)
    core, left, right = (
        float(torch.nan_to_num(share).amax()) for share in reference.leak(delta, U, V)
    )
    return Leak(core, left, right)
