"""Coordinates that train beside a weight, which follows them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sculpt.certificate.leak import rounding_bound
from sculpt.distributed.sharding import like_shards, local, whole, zeros
from sculpt.task.bases import Bases
from sculpt.task.layers import Coordinates, away_from, coordinates_name, install, remove
from sculpt.task.matrix import AVERAGED, Matrix, Side
from sculpt.task.originals import Original
from sculpt.task.targets import LOW_PRECISION, Target
from sculpt_kernels import expand_add_, expand_add_many_, is_divided


def scale_of(weight: Tensor, C: Tensor) -> float:
    """The factor `√(mn / rs)` between an `m x n` weight and the `r x s` coordinates it moves by.

    A step of an optimizer that normalises its elements (AdamW, Lion) has entries of about its rate
    `lr`. It moves a dense weight by `lr √(mn)` in Frobenius norm, and `U C Vᵀ` with orthonormal
    bases by `lr √(rs)`. With this factor both move as far, and gradients are as large.
    """
    return math.sqrt(weight.numel() / C.numel())


class CoordinateMatrix(Matrix):
    """`W = W₀ + scale U C Vᵀ`: float32 coordinates train, the weight follows.

    Attributes:
        state: coordinates and bases, shared with the layers.
        recompute: each step rounds the weight afresh from `W₀`, not its change.
    """

    def __init__(
        self, target: Target, bases: Bases, original: Original, state: Coordinates, recompute: bool
    ) -> None:
        super().__init__(target, bases, original)
        self.state = state
        self.recompute = recompute
        self.random_roundings = 0
        self._shape, self._wide = state.C.shape, state.C.dtype
        target.parameter.requires_grad_(False)
        for place in target.places:
            install(place, state)
        state.note_current(target.parameter)

    @property
    def trained(self) -> nn.Parameter:
        return self.state.C

    def roundings(self) -> int | None:
        return None if self.recompute else self.random_roundings

    def adopt(self, parameter: nn.Parameter) -> None:
        """Let `parameter`, which others hold already, be the coordinates, with their values."""
        parameter.data = self.state.C.data
        self.state.C = parameter
        for place in self.target.places:
            place.module._parameters[coordinates_name(place.parameter)] = parameter
        self.state.note_current(self.target.parameter)

    def resume(self, C: Tensor, folded: Tensor | None, random_roundings: int) -> None:
        """Take up coordinates, those that are in the weight, and how often it was rounded."""
        state = self.state
        state.C.detach().copy_(C)
        self.random_roundings = random_roundings
        if state.folded is not None and folded is not None:
            state.folded.copy_(folded)
        if self.recompute:
            self.write(state.C.detach() if state.folded is None else state.folded)
        if not self._has_moved(written=False):
            state.note_current(self.target.parameter)

    def check_in_place(self) -> None:
        super().check_in_place()
        if self.state.C.shape != self._shape:
            raise RuntimeError(
                f"the coordinates of {self.name!r} have lost their shape during the task, as in "
                "FullyShardedDataParallel (FSDP1), which flattens parameters: call "
                "torch.distributed.fsdp.fully_shard (FSDP2) on the model, then begin_task()"
            )
        if self.state.C.dtype != self._wide:
            raise RuntimeError(
                f"the coordinates of {self.name!r} were converted from {self._wide} to "
                f"{self.state.C.dtype} during the task, as DeepSpeed's bf16 and fp16 do, and small "
                "steps would be lost: leave these off, and load the model in its dtype"
            )
        place = self.target.places[0]
        if place.module._parameters.get(coordinates_name(place.parameter)) is not self.state.C:
            raise RuntimeError(
                f"the coordinates of {self.name!r} were replaced during the task, as fully_shard "
                "and accelerate do: call fully_shard(model) first, then begin_task()"
            )

    def attached(self) -> None:
        self.state.attached = True

    def call_on_change(self, changed: Callable[[], None]) -> None:
        self.state.changed = changed

    def trust(self) -> None:
        self.state.suspect = False

    def lacks_a_step(self) -> bool:
        state = self.state
        if is_divided(state.C):
            return state.has_moved()
        return state.C._version != state.seen[0] and self._has_moved(written=False)

    def has_changed(self) -> bool:
        return bool(local(self.state.C.detach()).any())

    def is_touched(self) -> bool:
        return self.state.is_touched(self.target.parameter)

    def settle(self, written: bool, thorough: bool) -> bool:
        state = self.state
        written = written or state.loaded or self._weight_was_written()
        moved = self._has_moved(written or thorough)
        if (written or thorough) and moved and self._explains(state.C.detach()):
            self.commit()  # Both were put back together.
            return False
        look = written or (thorough and state.folded is not None)
        if look and moved and (state.loaded or not self._explains(state.folded)):
            raise self.refusal(self._left_over(state.C.detach()))
        if (written or thorough) and not moved:
            # Among random roundings a small change cannot be told by its size.
            known = written and not self.recompute
            if known or not self._explains(state.C.detach()):
                self._take_up()
        if not moved:
            state.note_current(self.target.parameter)
        return moved

    def _weight_was_written(self) -> bool:
        return self.state.versions(self.target.parameter)[1] != self.state.seen[1]

    def _has_moved(self, written: bool) -> bool:
        """Whether the coordinates, and not the weight, are others than at the last `commit`."""
        return self.state.has_moved()

    def _explains(self, C: Tensor | None) -> bool:
        """Whether the weight is that of the coordinates but for what rounding leaves."""
        return C is not None and self._left_over(C) <= 2 * self._rounding()

    def _rounding(self) -> float:
        return rounding_bound(self.weight, self.roundings())

    def _left_over(self, C: Tensor) -> float:
        """`‖W - W₀ - scale U C Vᵀ‖`."""
        rest = self.weight.to(C.dtype) - self.before().to(C.dtype)
        self._add_(rest, -C)
        return float(whole(torch.linalg.vector_norm(rest)))

    def _take_up(self) -> None:
        """Let the coordinates be those of the weight, as it was written."""
        C, weight = self.state.C.detach(), self.weight
        whole_C = self._solve(whole(weight).to(C.dtype) - whole(self.before()).to(C.dtype))
        found = like_shards(weight, whole_C, stack=weight.ndim == 3)
        outside, rounding = self._left_over(found), self._rounding()
        # Averages of 16-bit weights have lost too much to be told from other changes.
        if outside > rounding * (2 if weight.dtype in LOW_PRECISION else AVERAGED):
            raise self.refusal(outside)
        local(C).copy_(local(found))
        if self.recompute and (outside > 2 * rounding or self.state.folded is None):
            self.write(C)
        self.commit()

    def _solve(self, D: Tensor) -> Tensor:
        """The coordinates of what is allowed of a change `D` of the whole weight."""
        # In float64, which autocast leaves alone.
        U, V = (None if B is None else whole(B).double() for B in (self.state.U, self.state.V))
        C = D.double() if V is None else D.double() @ V
        C = C if U is None else U.mT @ C
        return self._confined((C / self.state.scale).to(D.dtype))

    def _confined(self, C: Tensor) -> Tensor:
        """Coordinates without what is not allowed of them."""
        state = self.state
        return C if state.removed is None else away_from(C, state.removed, state.U is None)

    def _add_(self, X: Tensor, C: Tensor) -> None:
        """`X += scale U C Vᵀ`."""
        state = self.state
        U, V = (None if B is None else B.to(C.dtype) for B in (state.U, state.V))
        expand_add_(X, C, U, V, alpha=state.scale)

    def write(self, C: Tensor) -> None:
        """`W ← W₀ + scale U C Vᵀ`, rounded once."""
        state = self.state
        expand_add_(self.weight, C, state.U, state.V, alpha=state.scale, base=self.before())

    def commit(self) -> None:
        state = self.state
        if state.folded is not None:
            state.folded.copy_(state.C.detach())
        state.note_current(self.target.parameter)

    def truth(self) -> Tensor:
        C = self.state.C.detach()
        total = self.before().to(C.dtype, copy=True)
        self._add_(total, C)
        return total

    def end(self, *, undo: bool = False) -> None:
        state = self.state
        if undo:
            self._restore()
        elif not self.recompute or self._has_moved(written=False):
            self.write(state.C.detach())
        for place in self.target.places:
            remove(place)
        state.end(self.target.parameter)


class CompactMatrix(CoordinateMatrix):
    """Coordinates in the trainable subspaces of both sides, or of the shorter one."""

    def __init__(self, target: Target, bases: Bases, original: Original, recompute: bool) -> None:
        weight = target.oriented(target.parameter.detach())
        U, V = bases.U, bases.V
        rows = weight.shape[-2] if U is None else U.shape[-1]
        columns = weight.shape[-1] if V is None else V.shape[-1]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        C = zeros(weight, (*weight.shape[:-2], rows, columns), dtype)
        state = Coordinates(
            nn.Parameter(C),
            U,
            V,
            bases.removed,
            torch.zeros_like(C),
            bases.gain * scale_of(weight, C),
        )
        super().__init__(target, bases, original, state, recompute)

    def follow(self, seed: Tensor) -> None:
        follow_together([self], [seed])

    def change(self) -> Tensor:
        """The coordinates that the weight starts anew from `W₀` with, or what it lacks of them."""
        state, C = self.state, self.state.C.detach()
        if state.removed is not None:
            C.copy_(self._confined(C))
        assert state.folded is not None
        return C if self.recompute else C - state.folded

    def commit(self) -> None:
        super().commit()
        self.random_roundings += not self.recompute

    def undo(self, followed: bool) -> None:
        state = self.state
        if followed and not self.recompute:
            # Random roundings cannot be taken back: this weight and its coordinates go on together.
            self.commit()
            return
        assert state.folded is not None
        state.C.detach().copy_(state.folded)
        if followed:
            self.write(state.folded)
        state.note_current(self.target.parameter)

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
