"""The cost model of `split`: seconds by each method, and which of them `auto` takes.

Products are counted exactly, as the methods ask for them. What the library's decompositions take is
not a matter of arithmetic: on a GPU they wait for one column after the other and move data. Their
rates here are assumptions until `python -m bench.gpu --only subspaces` has run on that device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from sculpt_kernels import checks
from sculpt_kernels.plan.devices import Device, device_model
from sculpt_kernels.subspaces import spectral
from sculpt_kernels.subspaces.quadrature import STEPS, probes
from sculpt_kernels.subspaces.symmetric import symmetric_share

# Decompositions: share of the rate of products for the nominal operations of Golub and Van Loan
# (`9k³` for eigenvectors, `6nk² + 20k³` for singular vectors, `4nk²` for a QR with its factor), and
# seconds per column in which nothing else can happen. On an H100 eigensolvers are published to use
# less than 3 % of the device (Wang et al., "Extracting the potential of emerging hardware
# accelerators for symmetric eigenvalue decomposition", arXiv 2410.02170), which is what these give
# at 4096; a bidiagonalization does half of its work in products with vectors. On the CPU they are
# measured: `bench/results/subspaces-cpu.json`.
_SHARES = {
    "gpu": {"eigh": 0.05, "svd": 0.02, "qr": 0.1},
    "cpu": {"eigh": 0.7, "svd": 0.4, "qr": 0.5},
}
_COLUMN_SECONDS = {
    "gpu": {"eigh": 3e-5, "svd": 6e-5, "qr": 1e-5, "cholesky": 2e-6},
    "cpu": {"eigh": 1e-6, "svd": 1e-6, "qr": 1e-6, "cholesky": 1e-7},
}
# Between two kernels that depend on each other; small eigenproblems are solved one by one.
_LAUNCH = {"gpu": 5e-6, "cpu": 5e-6}
# Power iterations until the captured energy of a flat spectrum settles.
_POWER_ITERS = 8


@dataclass(frozen=True)
class Cost:
    """Operations in products, bytes of memory-bound passes, and seconds of anything else."""

    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops, self.bytes + other.bytes, self.seconds + other.seconds
        )


@dataclass(frozen=True)
class SplitPlan:
    """What splitting `count` matrices of one shape costs.

    Attributes:
        shape: `(m, n)`; rank: preserved rank; part: `"low"` or `"high"`; count; dtype; device.
        seconds: of all matrices, by method, slowest included; flops: of one, in products.
        method: the fastest of the methods whose subspaces are optimal: what `auto` takes.
    """

    shape: tuple[int, int]
    rank: int
    part: str
    count: int
    dtype: torch.dtype
    device: str
    seconds: dict[str, float]
    flops: dict[str, float]
    method: str

    @property
    def speedup(self) -> float:
        """Seconds of an SVD over those of `method`."""
        return self.seconds["svd"] / self.seconds[self.method]

    def __str__(self) -> str:
        m, n = self.shape
        others = ", ".join(
            f"{name} {self.seconds[name]:.3g} s" for name in self.seconds if name != self.method
        )
        return (
            f"Splitting {self.count} matrices of {m} x {n} ({checks.dtype_name(self.dtype)}) at "
            f"rank {self.rank} on {self.device} is predicted to take "
            f"{self.seconds[self.method]:.3g} s by {self.method} ({others})."
        )


def plan_split(
    shape: tuple[int, ...],
    rank: int,
    *,
    part: str = "low",
    count: int = 1,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device | None = None,
) -> SplitPlan:
    """Predict what `split` takes, by each method.

    Args:
        shape: `(m, n)`; leading dimensions are ignored.
        rank: preserved rank `h`, `0 <= h <= min(m, n)`.
        part: which bases are asked for.
        count: how many matrices.
        dtype: that of the computation; the training layer asks for float64.
        device: as in `plan`.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    sizes = tuple(shape)[-2:]
    if len(sizes) < 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"shape must be (..., m, n) of sizes > 0; got {tuple(shape)}")
    k, n = sorted(sizes)
    checks.rank_in("rank", rank, k)
    checks.choice("part", part, checks.PARTS)
    if type(count) is not int or count < 1:
        raise ValueError(f"count must be an int of at least 1; got {checks.describe(count)}")
    if dtype not in checks.FLOATS:
        raise TypeError(f"dtype must be a floating dtype; got {checks.describe(dtype)}")
    dtype = torch.promote_types(dtype, torch.float32)
    model = device_model(device)
    t = rank if part == "high" else k - rank
    costs = {
        "svd": (_decomposition("svd", 6 * n * k**2 + 20 * k**3, k, dtype, model), dtype),
        "gram": (_gram(k, n, t, dtype, model), dtype),
        "range": (_range(k, n, rank, part, dtype, model), dtype),
        "spectral": (_spectral(k, n, rank, part, model), torch.float64),
    }
    seconds = {name: count * _seconds(cost, kind, model) for name, (cost, kind) in costs.items()}
    return SplitPlan(
        shape=(sizes[0], sizes[1]),
        rank=rank,
        part=part,
        count=count,
        dtype=dtype,
        device=model.name,
        seconds=seconds,
        flops={name: cost.flops for name, (cost, _) in costs.items()},
        method=min(("gram", "spectral", "svd"), key=seconds.__getitem__),
    )


def _kind(model: Device) -> str:
    return "gpu" if model.is_gpu else "cpu"


def _seconds(cost: Cost, dtype: torch.dtype, model: Device) -> float:
    return cost.flops / model.flops(dtype) + cost.bytes / model.bandwidth + cost.seconds


def _decomposition(name: str, flops: float, k: int, dtype: torch.dtype, model: Device) -> Cost:
    kind = _kind(model)
    share, column = _SHARES[kind][name], _COLUMN_SECONDS[kind][name]
    return Cost(seconds=flops / (share * model.flops(dtype)) + k * column)


def _symmetric(k: int, n: int, model: Device) -> Cost:
    """`A B` `(k, k)` that is symmetric, `A` of `n` columns."""
    return Cost(2.0 * k * k * n * symmetric_share(k, "cuda" if model.is_gpu else "cpu"))


def _factor(k: int, model: Device) -> Cost:
    """Cholesky factor."""
    return Cost(k**3 / 3, seconds=k * _COLUMN_SECONDS[_kind(model)]["cholesky"])


def _orthonormal(n: int, r: int, passes: int, model: Device) -> Cost:
    """Cholesky passes: Gram matrix, factor, triangular solve; and the polar step."""
    one = _symmetric(r, n, model) + _factor(r, model)
    return Cost(passes * (one.flops + n * r * r), seconds=passes * one.seconds)


def _gram(k: int, n: int, t: int, dtype: torch.dtype, model: Device) -> Cost:
    cost = _symmetric(k, n, model) + _decomposition("eigh", 9 * k**3, k, dtype, model)
    # The long side, the Gram matrix that measures it, and the step that mends it.
    cost += Cost(2.0 * n * k * t + 2.0 * n * t * t + 2.0 * t**3) + _symmetric(t, n, model)
    return cost


def _range(k: int, n: int, h: int, part: str, dtype: torch.dtype, model: Device) -> Cost:
    if not h:
        return Cost()
    w = min(k, h + max(8, h // 4))
    cost = Cost(2.0 * k * n * w) + _orthonormal(k, w, 2, model)
    for _ in range(_POWER_ITERS):
        cost += Cost(4.0 * k * n * w)
        cost += _orthonormal(n, w, 2, model) + _orthonormal(k, w, 2, model)
    cost += Cost(2.0 * k * n * w + 2.0 * k * w * h)
    cost += _decomposition("svd", 6 * n * w**2 + 20 * w**3, w, dtype, model)
    if part == "low":
        cost += _decomposition("qr", 4 * k**3 + 4 * n * k**2, 2 * k, dtype, model)
        cost += Cost(2.0 * n * k * (k - h) + 4.0 * n * h * (k - h))
    return cost


def _spectral(k: int, n: int, h: int, part: str, model: Device) -> Cost:
    if not 0 < h < k:
        return _gram(k, n, h if part == "high" else k - h, torch.float64, model)
    t = h if part == "high" else k - h
    cost = _symmetric(k, n, model) + subspace_cost(k, t, part == "high", model)
    # Image, its right vectors, and the two residuals.
    cost += Cost(4.0 * n * k * t + 2.0 * k * k * t + 8.0 * k * t * t)
    cost += _orthonormal(n, t, 2, model)
    if part == "low":
        # What rounding left of the leading vectors is taken out of the trailing ones.
        cost += Cost(4.0 * n * k * t + 4.0 * k * t * t + 2.0 * k * k * t)
        cost += _symmetric(k, t, model) + _factor(k, model)
    return cost


def subspace_cost(k: int, count: int, leading: bool, model: Device) -> Cost:
    """Of `invariant_subspace`, level by level."""
    launch = _LAUNCH[_kind(model)]
    if 2 * count > k or (2 * count == k and not leading):
        other = k - count
        passes = Cost(8.0 * k * count * other) + _orthonormal(k, count, 4, model)
        return subspace_cost(k, other, not leading, model) + passes
    w = spectral.width_of(count, spectral.margin_of(k))
    steps = len(spectral.polynomials(spectral.RESOLUTION, spectral.REMNANT))
    # Lanczos: the matrix is read once a step; the tridiagonal ones are solved one by one.
    small = probes(k) * (STEPS * _COLUMN_SECONDS[_kind(model)]["eigh"])
    cost = Cost(2.0 * STEPS * k * k * probes(k), 8.0 * STEPS * k * k, small + 12 * STEPS * launch)
    for _ in range(3 * steps):
        cost += _symmetric(k, k, model)
    cost += Cost(bytes=steps * 8 * 12.0 * k * k)
    cost += Cost(spectral.APPLICATIONS * 2.0 * k * k * w)
    cost += _orthonormal(k, w, 4, model)
    cost += Cost(2.0 * k * k * w) + _symmetric(w, k, model) + Cost(2.0 * k * w * count)
    if w > spectral.DIRECT:
        return cost + subspace_cost(w, count, leading, model)
    return cost + _decomposition("eigh", 9 * w**3, w, torch.float64, model)


@lru_cache(maxsize=1024)
def choose_method(
    shape: tuple[int, ...], rank: int | None, part: str, dtype: torch.dtype, device: torch.device
) -> str:
    """The algorithm of `method="auto"`: the fastest whose subspaces are optimal.

    On CPU that is `gram`, the fastest at nearly all shapes that were measured.
    """
    k = min(shape[-2:])
    # An energy says nothing of the rank before it is found: a middling one stands for it.
    rank = math.ceil(3 * k / 4) if rank is None else rank
    return plan_split(shape, rank, part=part, dtype=dtype, device=device).method
