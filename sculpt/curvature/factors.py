"""Second moments `F = Σ x xᵀ` of vectors `x`: sums that add up over batches and over tasks.

Three kinds hold the same thing in less and less memory: a whole matrix `d x d`, a sketch `d x p`,
a diagonal `d`. The sketch is `Y = F Ω` with a random test matrix `Ω` `(d, p)` that depends on the
shape alone, so that sketches add up too. Its eigenvectors are those of the Nyström approximation
`F̂ = Y (Ωᵀ Y)⁺ Yᵀ` (Tropp, Yurtsever, Udell and Cevher, "Fixed-rank approximation of a positive-
semidefinite matrix from streaming data", NIPS 2017) without what is below the rounding of the sums.
`F - F̂` is positive semi-definite, so that its trace norm, `tr F - tr F̂`, is the error, and known.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from sculpt_kernels import orthonormalize


class Factor(ABC):
    """`F = Σ x xᵀ` of vectors of length `size`; for a stack of matrices, one for each of them.

    Attributes:
        total: what is summed, float32 `(..., size, size)`, `(..., size, p)` or `(..., size)`.
        count: how many vectors there were, float64 `(...)`.
    """

    kind: ClassVar[str]

    def __init__(self, total: Tensor, count: Tensor) -> None:
        self.total = total
        self.count = count

    def add(self, x: Tensor, at: int | None = None, count: int | None = None) -> None:
        """Add the vectors `x` `(N, size)`; `at` is the member of a stack that they belong to.

        count: how many they count for, where that is not `N`.
        """
        total, counts = (self.total, self.count) if at is None else (self.total[at], self.count[at])
        with torch.autocast(x.device.type, enabled=False):
            self._add(total, x.to(total.dtype), at)
        counts += len(x) if count is None else count

    @abstractmethod
    def _add(self, total: Tensor, x: Tensor, at: int | None) -> None:
        """Add to `total`, which is the sum of one matrix."""

    def merge(self, other: Factor) -> None:
        """Add the sums of another factor of the same kind and shape."""
        for name, tensor in self.tensors().items():
            tensor += other.tensors()[name].to(tensor.device)

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by name."""
        return {"total": self.total, "count": self.count}

    @abstractmethod
    def trace(self) -> Tensor:
        """`tr F` `(...)`, float64."""

    @abstractmethod
    def quadratic(self, X: Tensor) -> Tensor:
        """`tr X F Xᵀ` `(...)` of rows `X` `(..., k, size)`, float64."""


class Full(Factor):
    """`F` itself."""

    kind = "full"

    def _add(self, total: Tensor, x: Tensor, at: int | None) -> None:
        half = len(total) // 2
        x1, x2 = x[:, :half], x[:, half:]
        total[:half, :half].addmm_(x1.mT, x1)
        total[half:, half:].addmm_(x2.mT, x2)
        total[half:, :half].addmm_(x2.mT, x1)
        total[:half, half:] = total[half:, :half].mT

    def trace(self) -> Tensor:
        return self.total.diagonal(dim1=-2, dim2=-1).double().sum(-1)

    def quadratic(self, X: Tensor) -> Tensor:
        X = X.double()
        return ((X @ self.total.double()) * X).sum((-2, -1))


class Diagonal(Factor):
    """The diagonal of `F`; where vectors are rows of the identity, that is all there is."""

    kind = "diagonal"

    def _add(self, total: Tensor, x: Tensor, at: int | None) -> None:
        total += x.square().sum(0)

    def add_indices(self, indices: Tensor) -> None:
        """Add the rows `indices` of the identity."""
        ones = torch.ones_like(indices, dtype=self.total.dtype).flatten()
        self.total.index_add_(-1, indices.flatten(), ones)
        self.count += indices.numel()

    def trace(self) -> Tensor:
        return self.total.double().sum(-1)

    def quadratic(self, X: Tensor) -> Tensor:
        return (self.total.double()[..., None, :] * X.double().square()).sum((-2, -1))


class Sketch(Factor):
    """`Y = F Ω`, and `tr F`."""

    kind = "sketch"

    def __init__(self, total: Tensor, count: Tensor, squares: Tensor) -> None:
        super().__init__(total, count)
        self.squares = squares

    def _add(self, total: Tensor, x: Tensor, at: int | None) -> None:
        total.addmm_(x.mT, x @ self.test_matrix())
        own = self.squares if at is None else self.squares[at]
        own += x.double().square().sum()

    def members(self) -> list[Sketch]:
        """Those of a stack, which share its memory."""
        return [Sketch(*one) for one in zip(self.total, self.count, self.squares, strict=True)]

    def test_matrix(self) -> Tensor:
        """`Ω` `(size, p)`: independent standard normal numbers."""
        size, width = self.total.shape[-2:]
        return _test_matrix(size, width, self.total.device)

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "squares": self.squares}

    def trace(self) -> Tensor:
        return self.squares

    def quadratic(self, X: Tensor) -> Tensor:
        """The same, where what the sketch has not resolved is spread evenly over the rest."""
        X = X.double()
        Q, values = self.eigenpairs()
        within = (X @ Q).square().sum(-2)
        size, width = Q.shape[-2:]
        rest = (self.trace() - values.sum(-1)).clamp_min(0) / max(1, size - width)
        outside = (X.square().sum((-2, -1)) - within.sum(-1)).clamp_min(0)
        return (values * within).sum(-1) + rest * outside

    def eigenpairs(self) -> tuple[Tensor, Tensor]:
        """Eigenvectors `(..., size, p)` and eigenvalues `(..., p)` of `F̂`, descending, float64."""
        Y, Omega = self.total.double(), self.test_matrix().double()
        inner = Omega.mT @ Y
        sizes, mixed = torch.linalg.eigh((inner + inner.mT) / 2)
        # The sums are float32: what is smaller than their rounding is not resolved.
        unit = torch.finfo(self.total.dtype).eps * math.sqrt(Y.shape[-2])
        least = (unit * torch.linalg.matrix_norm(Y))[..., None]
        scales = torch.where(sizes > least, sizes.rsqrt(), 0.0)
        B = (Y @ mixed) * scales[..., None, :]
        # Squared singular values of B are what is wanted, so that a Gram matrix will do.
        values, vectors = torch.linalg.eigh(B.mT @ B)
        Q = orthonormalize(B @ vectors.flip(-1))
        return Q, values.flip(-1).clamp_min(0)


@lru_cache(maxsize=4)
def _test_matrix(size: int, width: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, width, generator=generator).to(device)


KINDS: dict[str, type[Factor]] = {kind.kind: kind for kind in (Full, Diagonal, Sketch)}


def empty(kind: str, shape: tuple[int, ...], device: torch.device, width: int) -> Factor:
    """A factor without vectors; `shape` is `(..., size)`, `width` the columns of a sketch."""
    *stack, size = shape
    count = torch.zeros(stack, dtype=torch.float64, device=device)
    if kind == "sketch":
        total = torch.zeros(*stack, size, min(width, size), device=device)
        return Sketch(total, count, torch.zeros_like(count))
    tail = (size, size) if kind == "full" else (size,)
    return KINDS[kind](torch.zeros(*stack, *tail, device=device), count)


def bytes_of(kind: str, shape: tuple[int, ...], width: int) -> int:
    """Memory of the sums of such a factor."""
    *_, size = shape
    columns = {"full": size, "sketch": min(width, size), "diagonal": 1}[kind]
    return 4 * math.prod(shape) * columns
