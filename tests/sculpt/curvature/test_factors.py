"""Second moments that add up, whole, as sketches and as diagonals."""

from __future__ import annotations

import pytest
import torch

from sculpt.curvature.factors import Factor, _test_matrix, bytes_of, empty
from tests.sculpt.curvature.oracle import UNIT, assert_sums

CPU = torch.device("cpu")


def vectors(count: int, size: int, rank: int | None = None, decay: float = 1.0) -> torch.Tensor:
    """`count` vectors in float32, in the span of `rank` directions of decaying lengths."""
    g = torch.Generator().manual_seed(size)
    rank = size if rank is None else rank
    basis = torch.linalg.qr(torch.randn(size, rank, generator=g, dtype=torch.float64)).Q
    scales = decay ** torch.arange(rank)
    return (torch.randn(count, rank, generator=g) @ (scales[:, None] * basis.mT).float()).float()


def made(kind: str, X: torch.Tensor, width: int = 8, parts: int = 3) -> Factor:
    factor = empty(kind, (X.shape[-1],), CPU, width)
    for part in X.chunk(parts):
        factor.add(part)
    return factor


def moments(X: torch.Tensor, kind: str = "full") -> torch.Tensor:
    F = X.double().mT @ X.double()
    return F.diagonal().diag_embed() if kind == "diagonal" else F


def rounding_of(sketch: Factor, X: torch.Tensor, rank: int) -> float:
    """How far a sketch of vectors in `rank` directions may be from their moments.

    What rounding adds to Y, `(N + 2) u` of the sizes, is seen through `(VᵀΩ)⁺`.
    """
    if rank == 0:
        return 0.0
    Omega = sketch.test_matrix().double()
    V = torch.linalg.svd(X.double()).Vh[:rank].mT
    through = float(torch.linalg.matrix_norm(torch.linalg.pinv(V.mT @ Omega), 2))
    size = float(torch.linalg.matrix_norm(Omega, 2))
    added = (len(X) + 2) * UNIT * float(moments(X).norm()) * size
    return added * (2 * through + through**2 * size)


@pytest.mark.parametrize("kind", ["full", "diagonal", "sketch"])
@pytest.mark.parametrize("size", [1, 7, 20])
def test_sums_traces_and_quadratic_forms(kind, size):
    """A sketch of eight columns of vectors in five directions knows all of them."""
    X = vectors(60, size, rank=min(size, 5))
    factor = made(kind, X)
    F = moments(X, kind)
    assert int(factor.count) == 60
    if kind != "sketch":
        assert_sums(factor, X)
    # The trace is a sum of the squares on the diagonal, each of 60 numbers.
    assert abs(factor.trace() - F.trace()) <= (60 + 5) * UNIT * F.trace()
    assert factor.trace().dtype == torch.float64
    Y = torch.randn(3, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # Of a sketch what is not resolved is spread over the rest, and no more than it has lost.
    lost = 2 * rounding_of(factor, X, min(size, 5)) if kind == "sketch" else 0.0
    limit = float(Y.square().sum()) * (65 * UNIT * float(F.trace()) + lost)
    assert abs(factor.quadratic(Y) - (Y @ F @ Y.mT).trace()) <= limit


@pytest.mark.parametrize("kind", ["full", "diagonal", "sketch"])
def test_two_halves_make_one(kind):
    X = vectors(64, 20)
    whole, first, second = made(kind, X), made(kind, X[:40]), made(kind, X[40:])
    first.merge(second)
    sizes = X.abs().mT @ X.abs()
    if kind == "sketch":
        sizes = X.abs().mT @ (X.abs() @ whole.test_matrix().abs())
    sizes = sizes.diagonal() if kind == "diagonal" else sizes
    # Two sums of 64 products, of sketches with sums of 20 products.
    assert ((whole.total - first.total).abs() <= 2 * (64 + 20 + 3) * UNIT * sizes).all()
    assert float(first.trace()) == pytest.approx(float(whole.trace()), rel=70 * UNIT)
    assert torch.equal(whole.count, first.count)


@pytest.mark.parametrize("kind", ["full", "diagonal", "sketch"])
def test_a_stack_is_its_members(kind):
    parts = [vectors(30, 12), vectors(0, 12), 3 * vectors(20, 12, rank=4)]
    stack = empty(kind, (3, 12), CPU, 6)
    alone = [made(kind, part, width=6, parts=1) for part in parts]
    for at, part in enumerate(parts):
        stack.add(part, at)
    X = torch.randn(3, 4, 12, dtype=torch.float64)
    for at, one in enumerate(alone):
        for name, tensor in one.tensors().items():
            assert torch.equal(stack.tensors()[name][at], tensor)
        assert stack.trace()[at] == one.trace()
        torch.testing.assert_close(stack.quadratic(X)[at], one.quadratic(X[at]))
        if kind == "sketch":
            Q, values = stack.eigenpairs()
            torch.testing.assert_close(values[at], one.eigenpairs()[1])
            gram = Q[at].mT @ Q[at]
            torch.testing.assert_close(gram, torch.eye(6).double(), rtol=0, atol=1e-12)


def test_indices_are_rows_of_the_identity():
    factor = empty("diagonal", (5,), CPU, 8)
    factor.add_indices(torch.tensor([[1, 3], [3, 0]]))
    assert factor.total.tolist() == [1, 1, 0, 2, 0]
    assert int(factor.count) == 4


# A test matrix that is nearly or exactly square has columns that are nearly dependent.
@pytest.mark.parametrize("size", [8, 9, 10, 40])
@pytest.mark.parametrize("rank", [0, 1, 4, 5])
def test_a_sketch_of_few_directions_is_exact(size, rank):
    X = vectors(100, size, rank=rank)
    sketch, F = made("sketch", X), moments(X)
    Q, values = sketch.eigenpairs()
    assert Q.shape == (size, 8)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(8).double(), rtol=0, atol=1e-12)
    assert (values[:-1] >= values[1:]).all()
    assert (values >= 0).all()
    error = torch.linalg.matrix_norm(Q @ values.diag() @ Q.mT - F)
    assert error <= rounding_of(sketch, X, rank)


@pytest.mark.parametrize("decay", [0.7, 0.9])
def test_a_sketch_of_many_directions_errs_as_nystroem_does(decay):
    """`F - F̂ >= 0`, at most what Tropp et al. (2017) expect, and the error is known."""
    size, width = 60, 20
    X = vectors(400, size, decay=decay)
    sketch, F = made("sketch", X, width=width), moments(X)
    Q, values = sketch.eigenpairs()
    Fhat = Q @ values.diag() @ Q.mT
    exact = torch.linalg.eigvalsh(F).flip(0)
    rounding = 500 * UNIT * float(exact[0])
    rest = F - Fhat
    assert torch.linalg.eigvalsh(rest)[0] >= -rounding
    error = float(rest.trace())
    # E ‖F - F̂‖₁ <= (1 + r/(p - r - 1)) Σ_{j > r} λ_j for every r < p - 1.
    best = min((1 + r / (width - r - 1)) * float(exact[r:].sum()) for r in range(width - 1))
    assert float(exact[width:].sum()) - rounding <= error <= 2 * best
    assert float(sketch.trace() - values.sum()) == pytest.approx(error, abs=width * rounding)
    # Eigenvalues are never above the true ones, and the leading ones are close.
    assert (values <= exact[:width] + rounding).all()
    assert (exact[:5] - values[:5]).max() <= error
    # What is not resolved counts as spread evenly: right for the trace of everything.
    eye = torch.eye(size, dtype=torch.float64)
    assert float(sketch.quadratic(eye)) == pytest.approx(float(sketch.trace()), rel=1e-9)


def test_the_test_matrix_is_the_same_everywhere_and_ever():
    """Sketches in files add up with those that are made later."""
    one, other = empty("sketch", (30,), CPU, 8), empty("sketch", (2, 30), CPU, 8)
    assert torch.equal(one.test_matrix(), other.test_matrix())
    _test_matrix.cache_clear()
    expected = torch.tensor([-1.930853, 0.905808])
    torch.testing.assert_close(one.test_matrix()[0, :2], expected, rtol=0, atol=1e-6)
    assert float(one.test_matrix().std()) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("kind", ["full", "diagonal", "sketch"])
def test_bytes_are_those_of_the_sums(kind):
    for shape in ((30,), (3, 30), (5,)):
        total = empty(kind, shape, CPU, 8).total
        assert bytes_of(kind, shape, 8) == total.numel() * total.element_size()
        assert total.dtype == torch.float32
