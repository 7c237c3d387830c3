"""Operations on matrices that are divided over processes, as `DTensor`s.

A matrix `(..., m, n)` may be divided along one of its dimensions (FSDP2, and HSDP with replicas):
by rows, by columns, or by matrices of a stack. Shards may be uneven or empty. Bases are whole on
each process or divided by rows, along `m` or `n`; coordinates `(r, s)` either way. Each process
works on its shard alone and sums what is small: `r x s` where the algebra allows it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from sculpt_kernels import checks
from sculpt_kernels.products import compute_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

SWAPPED = {"none": "none", "both": "both", "left": "right", "right": "left",
           "core": "core", "strict": "strict"}  # fmt: skip


def is_divided(X: object) -> TypeGuard[DTensor]:
    """Whether `X` is a `DTensor`; whoever has one has imported its module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(X, module.DTensor)


def whole(B: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """All of `B` on this process, in `dtype`; converted before it travels."""
    B = B if dtype is None else B.to(dtype)
    return B.full_tensor() if is_divided(B) else B


def shard(B: Tensor) -> Tensor:
    """What this process has of `B`."""
    return B.to_local() if is_divided(B) else B


@dataclass(frozen=True)
class Division:
    """How a matrix `(..., m, n)` is divided: `axis` is 0 for rows, 1 for columns, 2 for a stack.

    `mesh_dim` is that of its device mesh; `start`, `size` the part of the axis that is here.
    """

    axis: int
    mesh_dim: int
    start: int
    size: int
    group: ProcessGroup
    coordinate: int

    @classmethod
    def of(cls, name: str, X: DTensor) -> Division:
        """Raises:
        ValueError: `X` is divided in another way.
        """
        from torch.distributed.tensor import Replicate, Shard

        mesh = X.device_mesh
        dims = [i for i, placement in enumerate(X.placements) if type(placement) is Shard]
        rest = [p for i, p in enumerate(X.placements) if i not in dims and type(p) is not Replicate]
        if len(dims) != 1 or rest:
            raise ValueError(
                f"{name} must be divided along one dimension, as by fully_shard; "
                f"got placements {X.placements}"
            )
        (mesh_dim,) = dims
        placement = X.placements[mesh_dim]
        assert isinstance(placement, Shard)
        dim = placement.dim % X.ndim
        # Chunks are of one size, but for those at the end.
        chunk = -(-X.shape[dim] // mesh.size(mesh_dim))
        coordinate = mesh.get_local_rank(mesh_dim)
        axis = {X.ndim - 2: 0, X.ndim - 1: 1}.get(dim, 2)
        size = X.to_local().shape[dim]
        start = min(coordinate * chunk, X.shape[dim])
        return cls(axis, mesh_dim, start, size, mesh.get_group(mesh_dim), coordinate)

    def along(self, B: Tensor, axis: int) -> Tensor:
        """The part of `B` beside the shard; `axis` is 0 (-2) or 1 (-1), or 2 for a stack."""
        dim = {0: B.ndim - 2, 1: B.ndim - 1, 2: 0}[axis]
        if is_divided(B):
            own = B.placements[self.mesh_dim]
            if own.is_shard(dim) and B.to_local().shape[dim] == self.size:
                return B.to_local()
            B = B.full_tensor()
        return B.narrow(dim, self.start, self.size)

    def factors(
        self, U: Tensor | None, C: Tensor, V: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """`U`, `C`, `V` so that `U C Vᵀ` is the part of the product beside the shard."""
        if self.axis == 2:
            left, core, right = (
                B if B is None or B.ndim == 2 else self.along(B, 2) for B in (U, C, V)
            )
            assert core is not None
            return left, core, right
        near, far = (U, V) if self.axis == 0 else (V, U)
        # Where the divided side has no basis the coordinates themselves are along it.
        core = whole(C) if near is not None else self.along(C, self.axis)
        near = None if near is None else self.along(near, 0)
        far = None if far is None else whole(far)
        return (near, core, far) if self.axis == 0 else (far, core, near)

    def sum(self, X: Tensor) -> Tensor:
        """Of all shards, in place."""
        torch.distributed.all_reduce(X, group=self.group)
        return X


def project_(G: DTensor, U: Tensor | None, V: Tensor | None, form: str, complement: str) -> None:
    """`sculpt_kernels.project_` of a divided `G`.

    Summed over the processes, for rows: `r x s` where the right side comes out of its basis
    (`core`, and `strict` with the complement there), else `r x n`; nothing for the side that is
    whole. Columns likewise, and nothing for a stack.

    Raises:
        TypeError, ValueError: an argument does not fit; raised before `G` is changed.
    """
    checks.sides(G, U, V, form, complement)
    division = Division.of("G", G)
    X = G.to_local()
    checks.writable("G", X)
    wide = compute_dtype(G.dtype)
    with torch.no_grad():
        if division.axis == 2:
            parts = (B if B is None or B.ndim == 2 else division.along(B, 2) for B in (U, V))
            A, B = (None if part is None else whole(part).to(wide) for part in parts)
            X.copy_(_projected(X.to(wide), A, B, form, complement, None))
            return
        mirrored = division.axis == 1
        near, far = (V, U) if mirrored else (U, V)
        A = None if near is None else division.along(near, 0).to(wide)
        B = None if far is None else whole(far).to(wide)
        if mirrored:
            form = SWAPPED[form]
            complement = SWAPPED[complement]
        Y = (X.mT if mirrored else X).to(wide)
        found = _projected(Y, A, B, form, complement, division)
        X.copy_(found.mT if mirrored else found)


def _projected(
    X: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    form: str,
    complement: str,
    division: Division | None,
) -> Tensor:
    """Of rows `X` of a matrix: `A` has the same rows of the left basis, `B` is the right one.

    `core` is `X - L(R(X))` and `strict` `L(R(X))`, where `L` and `R` project onto what is removed
    in the one case, onto what is kept in the other.
    """
    keep = form != "core"
    inside_left = (complement in ("left", "both")) == keep
    inside_right = (complement in ("right", "both")) == keep

    def total(part: Tensor) -> Tensor:
        return part if division is None else division.sum(part.contiguous())

    right, image = X, None if B is None else X @ B
    if B is not None and image is not None:
        right = image @ B.mT if inside_right else X - image @ B.mT
    if A is None:
        return right
    if B is not None and image is not None and inside_right:
        seen = total(A.mT @ image) @ B.mT
    else:
        seen = total(A.mT @ right)
    both = A @ seen if inside_left else right - A @ seen
    return both if keep else X - both


def compress(G: DTensor, U: Tensor, V: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`sculpt_kernels.compress` of a divided `G`, whole on every process: one sum of `r x s`.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    checks.sides(G, U, V, "core", "none")
    division = Division.of("G", G)
    if division.axis == 2:
        raise ValueError("G must be divided along its rows or columns, not along its stack")
    wide = compute_dtype(G.dtype)
    X = G.to_local().to(wide)
    with torch.no_grad():
        if division.axis == 0:
            core = division.along(U, 0).to(wide).mT @ (X @ whole(V).to(wide))
        else:
            core = (whole(U).to(wide).mT @ X) @ division.along(V, 0).to(wide)
        return division.sum(core.contiguous()).to(out_dtype)
