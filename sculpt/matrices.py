"""One weight during a task: what trains, how the weight follows, what it was, and how it ends.

Three kinds, one for each engine; all see the weight as `(..., out, in)`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sculpt.distributed.sharding import as_shard, zeros
from sculpt.layers import Coordinates, away_from, coordinates_name, install, remove
from sculpt.originals import Original
from sculpt.subspaces import Bases
from sculpt.targets import Target
from sculpt_kernels import expand_add_, expand_add_many_, is_divided, project_

LOW_PRECISION = (torch.bfloat16, torch.float16)
Side = tuple[Tensor, bool]
"""A basis, and whether it spans what is protected (else what is free)."""


class Matrix(ABC):
    """A weight `W` `(..., m, n)` while it is sculpted.

    Attributes:
        target: where it is in the model, and its preserved rank.
        bases: of its subspaces.
        original: `W₀`, the weight before the task.
    """

    def __init__(self, target: Target, bases: Bases, original: Original) -> None:
        self.target = target
        self.bases = bases
        self.original = original
        self._weight = target.parameter
        self._dtype, self._device = target.parameter.dtype, target.parameter.device

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def weight(self) -> Tensor:
        """`W` `(..., m, n)` as it is now, without its autograd history."""
        return self.target.oriented(self.target.parameter.detach())

    @property
    def trained(self) -> nn.Parameter:
        """What the optimizer holds."""
        return self.target.parameter

    def before(self) -> Tensor:
        """`W₀` `(..., m, n)`, on the device of `W` and divided as it is."""
        weight = self.target.parameter.detach()
        return self.target.oriented(as_shard(weight, self.original.get(weight.device)))

    def check_in_place(self) -> None:
        """Raises:
        RuntimeError: the module trains something else by now, or has lost its weight.
        """
        if hasattr(self.target.parameter, "ds_id"):
            raise RuntimeError(
                f"the weight of {self.name!r} was partitioned by DeepSpeed ZeRO-3 during the task, "
                "which leaves modules without their matrices; use "
                "torch.distributed.fsdp.fully_shard (FSDP2), or ZeRO-1 or ZeRO-2"
            )

    def check_weight(self) -> None:
        """Raises:
        RuntimeError: the module has another weight by now, or it is elsewhere or of another dtype.
        """
        weight = self.target.parameter
        if weight is not self._weight:
            raise RuntimeError(
                f"the weight of {self.name!r} was replaced during the task: copy values into the "
                "parameter that is there; where fully_shard or accelerate did it, call "
                "fully_shard(model) first, then begin_task()"
            )
        if weight.dtype != self._dtype or weight.device != self._device:
            raise RuntimeError(
                f"the weight of {self.name!r} was {self._dtype} on {self._device} when the task "
                f"began and is {weight.dtype} on {weight.device} now: optimizer, bases and "
                "original weights stayed behind. Move it before begin_task() or after end_task()"
            )

    def attached(self) -> None:  # noqa: B027  (coordinates are guarded in the forward)
        """From here on an optimizer's steps end with `follow`."""

    @abstractmethod
    def follow(self, seed: Tensor) -> None:
        """Bring the weight up to date with an optimizer step; `commit` or `undo` comes next."""

    def commit(self) -> None:  # noqa: B027  (nothing to note for engines that train the weight)
        """The step stands."""

    def undo(self, followed: bool) -> None:  # noqa: B027  (the optimizer has moved the weight)
        """Go back to before the step, as far as the weight can; `followed` says if it moved."""

    def truth(self) -> Tensor:
        """What the weight stands for, in float32 or the wider dtype of the weight."""
        return self.weight

    @abstractmethod
    def protected(self) -> tuple[Side, Side]:
        """The left and the right side that must not be touched."""

    @abstractmethod
    def end(self) -> None:
        """Round the truth into the weight, once; the module is a plain one again."""


def scale_of(weight: Tensor, C: Tensor) -> float:
    """The factor `√(mn / rs)` between an `m x n` weight and the `r x s` coordinates it moves by.

    A step of an optimizer that normalises its elements (AdamW, Lion) has entries of about its rate
    `lr`. It moves a dense weight by `lr √(mn)` in Frobenius norm, and `U C Vᵀ` with orthonormal
    bases by `lr √(rs)`. With this factor both move as far, and gradients are as large.
    """
    return math.sqrt(weight.numel() / C.numel())


class CompactMatrix(Matrix):
    """`W = W₀ + scale U C Vᵀ`: coordinates train, the weight follows."""

    def __init__(self, target: Target, bases: Bases, original: Original, recompute: bool) -> None:
        super().__init__(target, bases, original)
        self.recompute = recompute
        weight = self.weight
        U, V = bases.U, bases.V
        rows = weight.shape[-2] if U is None else U.shape[-1]
        columns = weight.shape[-1] if V is None else V.shape[-1]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        C = zeros(weight, (*weight.shape[:-2], rows, columns), dtype)
        self.state = Coordinates(
            nn.Parameter(C), U, V, bases.removed, torch.zeros_like(C), scale_of(weight, C)
        )
        target.parameter.requires_grad_(False)
        for place in target.places:
            install(place, self.state)

    @property
    def trained(self) -> nn.Parameter:
        return self.state.C

    def adopt(self, parameter: nn.Parameter) -> None:
        """Let `parameter`, which others hold already, be the coordinates, with their values."""
        parameter.data = self.state.C.data
        self.state.C = parameter
        for place in self.target.places:
            place.module._parameters[coordinates_name(place.parameter)] = parameter
        self.state.note_current()

    def check_in_place(self) -> None:
        super().check_in_place()
        if self.state.C.shape != self.state.folded.shape:
            raise RuntimeError(
                f"the coordinates of {self.name!r} have lost their shape during the task, as in "
                "FullyShardedDataParallel (FSDP1), which flattens parameters: call "
                "torch.distributed.fsdp.fully_shard (FSDP2) on the model, then begin_task()"
            )
        if self.state.C.dtype != self.state.folded.dtype:
            raise RuntimeError(
                f"the coordinates of {self.name!r} were converted from {self.state.folded.dtype} "
                f"to {self.state.C.dtype} during the task, as DeepSpeed's bf16 and fp16 do, and "
                "small steps would be lost: leave these off, and load the model in its dtype"
            )
        place = self.target.places[0]
        if place.module._parameters.get(coordinates_name(place.parameter)) is not self.state.C:
            raise RuntimeError(
                f"the coordinates of {self.name!r} were replaced during the task, as fully_shard "
                "and accelerate do: call fully_shard(model) first, then begin_task()"
            )

    def follow(self, seed: Tensor) -> None:
        follow_together([self], [seed])

    def change(self) -> Tensor:
        """The coordinates that the weight starts anew from `W₀` with, or what it lacks of them."""
        state, C = self.state, self.state.C.detach()
        if state.removed is not None:
            C.copy_(away_from(C, state.removed, state.U is None))
        return C if self.recompute else C - state.folded

    def write(self, C: Tensor) -> None:
        """`W ← W₀ + scale U C Vᵀ`, rounded once."""
        state = self.state
        expand_add_(self.weight, C, state.U, state.V, alpha=state.scale, base=self.before())

    def commit(self) -> None:
        self.state.folded.copy_(self.state.C.detach())
        self.state.note_current()

    def undo(self, followed: bool) -> None:
        state = self.state
        if followed and not self.recompute:
            # Random roundings cannot be taken back: this weight and its coordinates go on together.
            self.commit()
            return
        state.C.detach().copy_(state.folded)
        state.note_current()
        if followed:
            self.write(state.folded)

    def truth(self) -> Tensor:
        state = self.state
        dtype = state.C.dtype
        total = self.before().to(dtype, copy=True)
        bases = (None if B is None else B.to(dtype) for B in (state.U, state.V))
        return expand_add_(total, state.C.detach(), *bases, alpha=state.scale)

    def protected(self) -> tuple[Side, Side]:
        state = self.state
        sides = []
        for free in (state.U, state.V):
            if free is None:
                assert state.removed is not None
                sides.append((state.removed, True))
            else:
                sides.append((free, False))
        return sides[0], sides[1]

    def end(self) -> None:
        self.write(self.state.C.detach())
        for place in self.target.places:
            remove(place)
        self.state.end(self.target.parameter)


def follow_together(matrices: Sequence[CompactMatrix], seeds: Sequence[Tensor]) -> None:
    """Bring weights of one layout up to date, all recomputed or none, in common launches."""
    recompute = matrices[0].recompute
    expand_add_many_(
        [matrix.weight for matrix in matrices],
        [matrix.change() for matrix in matrices],
        [matrix.state.U for matrix in matrices],
        [matrix.state.V for matrix in matrices],
        alpha=matrices[0].state.scale,
        rounding="nearest" if recompute else "stochastic",
        seeds=None if recompute else torch.stack(list(seeds)),
        bases=[matrix.before() for matrix in matrices] if recompute else None,
    )


class UpdateMatrix(Matrix):
    """`W = W₀ + P(ΔW)`: the weight trains, and what steps did to it is projected.

    Always from `W₀`, so that the roundings of many steps do not add up. For 16-bit weights the sum
    of the projected steps is kept in float32 beside them.
    """

    def __init__(self, target: Target, bases: Bases, original: Original, form: str) -> None:
        super().__init__(target, bases, original)
        self.form = form
        target.parameter.requires_grad_(True)
        weight = self.weight
        self.delta: Tensor | None = None
        if weight.dtype in LOW_PRECISION:
            self.delta = torch.zeros_like(weight, dtype=torch.float32)
        self._guarded = True
        self._version = target.parameter._version
        self._handle = target.parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            self._arrived
        )

    def attached(self) -> None:
        self._guarded = False

    def commit(self) -> None:
        self._version = self.target.parameter._version

    def _arrived(self, parameter: Tensor) -> None:
        """A gradient: of a weight that has moved without being projected?"""
        # What happens to a divided tensor is not counted.
        if self._guarded and parameter._version != self._version and not is_divided(parameter):
            raise RuntimeError(
                f"the weight of {self.name!r} has changed and nothing was projected. Call "
                "sculptor.attach(optimizer) before the first step, or sculptor.update_weights() "
                "after changing weights by hand"
            )

    def _project_(self, X: Tensor) -> None:
        U, V = (None if B is None else B.to(X.dtype) for B in (self.bases.U, self.bases.V))
        project_(X, U, V, form=self.form, complement=self.bases.complement)

    def follow(self, seed: Tensor) -> None:
        W, W0 = self.weight, self.before()
        if self.delta is None:
            W.sub_(W0)
            try:
                self._project_(W)
            finally:
                W.add_(W0)
            return
        step = W.float() - (W0.float() + self.delta).to(W.dtype).float()
        self._project_(step)
        self.delta.add_(step)
        W.copy_(W0.float() + self.delta)

    def truth(self) -> Tensor:
        W0 = self.before()
        if self.delta is not None:
            return W0.float() + self.delta
        delta = self.weight - W0
        self._project_(delta)
        return W0 + delta

    def protected(self) -> tuple[Side, Side]:
        assert self.bases.U is not None
        assert self.bases.V is not None
        removed = self.bases.complement == "none"
        return (self.bases.U, removed), (self.bases.V, removed)

    def end(self) -> None:
        self._handle.remove()
        self.weight.copy_(self.truth())


class GradientMatrix(UpdateMatrix):
    """The paper's engine: gradients are projected as they arrive, and the optimizer leaks."""

    def __init__(self, target: Target, bases: Bases, original: Original, form: str) -> None:
        super().__init__(target, bases, original, form)
        self.delta = None

    def _arrived(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        with torch.no_grad():
            self._project_(self.target.oriented(parameter.grad))

    def follow(self, seed: Tensor) -> None:
        """Nothing to do: what the optimizer did stands."""

    def truth(self) -> Tensor:
        return self.weight

    def end(self) -> None:
        self._handle.remove()
