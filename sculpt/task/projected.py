"""Engines that project: the changes that steps make, or, as in the paper, gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sculpt.certificate.leak import rounding_bound
from sculpt.distributed.sharding import whole, zeros
from sculpt.task.bases import Bases
from sculpt.task.compact import CoordinateMatrix
from sculpt.task.layers import Coordinates
from sculpt.task.matrix import AVERAGED, Matrix, Side
from sculpt.task.originals import Original
from sculpt.task.targets import Target
from sculpt_kernels import is_divided, project_


class Projection:
    """What the constraint allows of a change of a weight, for engines that project.

    Attributes:
        gradients: what is projected are gradients, not the changes that steps make.
    """

    def __init__(self, bases: Bases, form: str, gradients: bool) -> None:
        self.bases = bases
        self.form = form
        self.gradients = gradients

    def apply_(self, X: Tensor) -> None:
        """Project a change, or a gradient, in place."""
        U, V = self.bases.U, self.bases.V
        assert U is not None
        assert V is not None
        U, V = ((B if is_divided(X) else whole(B)).to(X.dtype) for B in (U, V))
        project_(X, U, V, form=self.form, complement=self.bases.complement)

    def protected(self) -> tuple[Side, Side]:
        assert self.bases.U is not None
        assert self.bases.V is not None
        removed = self.bases.complement == "none"
        return (self.bases.U, removed), (self.bases.V, removed)


class DeltaMatrix(CoordinateMatrix):
    """`W = W₀ + C` with a float32 `C` as large as the 16-bit weight, so that small steps add up."""

    def __init__(self, target: Target, original: Original, projection: Projection) -> None:
        weight = target.oriented(target.parameter.detach())
        C = nn.Parameter(zeros(weight, tuple(weight.shape), torch.float32))
        self.projection = projection
        # A divided weight may be gathered when it is asked whether it has followed.
        folded = torch.zeros_like(C) if is_divided(C) else None
        state = Coordinates(C, None, None, None, folded, 1.0)
        super().__init__(target, projection.bases, original, state, recompute=True)
        self._handle = C.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]

    def _arrived(self, C: Tensor) -> None:
        if self.projection.gradients:
            assert C.grad is not None
            with torch.no_grad():
                self.projection.apply_(C.grad)

    def follow(self, seed: Tensor) -> None:
        self.write(self._confined(self.state.C.detach()))

    def _confined(self, C: Tensor) -> Tensor:
        if not self.projection.gradients:
            self.projection.apply_(C)
        return C

    def _has_moved(self, written: bool) -> bool:
        state = self.state
        if state.folded is not None:
            return state.has_moved()
        if torch.equal(self.weight, self.truth().to(self._dtype)):
            return False
        return not written or state.C._version != state.seen[0]

    def _add_(self, X: Tensor, C: Tensor) -> None:
        X.add_(C)

    def write(self, C: Tensor) -> None:
        self.weight.copy_(self.before().to(C.dtype) + C)

    def protected(self) -> tuple[Side, Side]:
        return self.projection.protected()

    def end(self, *, undo: bool = False) -> None:
        self._handle.remove()
        super().end(undo=undo)


class DenseMatrix(Matrix):
    """A float32 or float64 weight that trains itself.

    What steps did to it is projected from `W₀` on, so that the roundings of many steps do not add
    up; or its gradients are, as in the paper, and the optimizer leaks.
    """

    def __init__(self, target: Target, original: Original, projection: Projection) -> None:
        super().__init__(target, projection.bases, original)
        self.projection = projection
        target.parameter.requires_grad_(True)
        self._guarded = True
        self._version = target.parameter._version
        self._handle = target.parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            self._arrived
        )

    @property
    def trained(self) -> nn.Parameter:
        return self.target.parameter

    def attached(self) -> None:
        self._guarded = False

    def commit(self) -> None:
        self._version = self.target.parameter._version

    def lacks_a_step(self) -> bool:
        return self.is_touched() and not self.projection.gradients

    def is_touched(self) -> bool:
        weight = self.target.parameter
        # What happens to a divided tensor is not counted.
        return weight._version != self._version and not is_divided(weight)

    def _arrived(self, parameter: Tensor) -> None:
        """A gradient: to be projected, or of a weight that has moved without being projected?"""
        if self.projection.gradients:
            assert parameter.grad is not None
            with torch.no_grad():
                self.projection.apply_(self.target.oriented(parameter.grad))
        elif self._guarded and self.lacks_a_step():
            raise RuntimeError(
                f"the weight of {self.name!r} has changed and nothing was projected. Call "
                "sculptor.attach(optimizer) before the first step, or sculptor.update_weights() "
                "after changing weights by hand"
            )

    def settle(self, written: bool, thorough: bool) -> bool:
        if (written or thorough or self.is_touched()) and not self.projection.gradients:
            W = self.weight
            outside = float(whole(torch.linalg.vector_norm(W - self.truth())))
            if outside > AVERAGED * rounding_bound(W, None):
                raise self.refusal(outside)
        self.commit()
        return False

    def follow(self, seed: Tensor) -> None:
        if self.projection.gradients:
            return  # What the optimizer did stands.
        W, W0 = self.weight, self.before()
        W.sub_(W0)
        try:
            self.projection.apply_(W)
        finally:
            W.add_(W0)

    def truth(self) -> Tensor:
        if self.projection.gradients:
            return self.weight
        W0 = self.before()
        delta = self.weight - W0
        self.projection.apply_(delta)
        return W0 + delta

    def protected(self) -> tuple[Side, Side]:
        return self.projection.protected()

    def end(self, *, undo: bool = False) -> None:
        self._handle.remove()
        self._restore() if undo else self.weight.copy_(self.truth())
