"""Which directions are chosen, against dense eigenvectors in float64."""

from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch

from sculpt.curvature.directions import (
    ITERATIONS,
    LARGEST_GAIN,
    RIDGE,
    UNUSED,
    Directions,
    by_ratio,
    leading,
    share_of_trace,
    trailing,
)
from sculpt.curvature.factors import Diagonal, Factor, Full, empty
from sculpt.curvature.memory import Memory, Sides
from tests.sculpt.curvature.oracle import UNIT
from tests.sculpt.curvature.test_factors import CPU, made, vectors

SIZE = 40


def full(F: torch.Tensor) -> Full:
    return Full(F.float(), torch.tensor(100.0, dtype=torch.float64))


def with_eigenvalues(values: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix `(d, d)` with these eigenvalues, and its eigenvectors, in their order."""
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), generator=g).double()).Q
    return Q @ values.double().diag() @ Q.mT, Q


def angle(V: torch.Tensor, W: torch.Tensor) -> float:
    """The sine of the largest principal angle between two spans of equally many columns."""
    W = torch.linalg.qr(W.double()).Q
    return float(torch.linalg.matrix_norm(V.double() - W @ (W.mT @ V.double()), 2))


def assert_orthonormal(V: torch.Tensor) -> None:
    assert V.dtype == torch.float64
    eye = torch.eye(V.shape[-1], dtype=torch.float64).expand(*V.shape[:-2], -1, -1)
    assert (V.mT @ V - eye).abs().max() <= 1e-12


@pytest.mark.parametrize("t", [1, 7, 20, SIZE - 1])
def test_trailing_and_leading_eigenvectors(t):
    # A gap of 0.1 at t; float32 sums move eigenvectors by u ‖F‖ over the gap.
    values = torch.linspace(1, 2, SIZE)
    values[t:] += 0.1
    F, Q = with_eigenvalues(values)
    factor = full(F)
    V = trailing(factor, t)
    assert V.shape == (SIZE, t)
    assert_orthonormal(V)
    limit = SIZE * UNIT * 2.1 / 0.1
    assert angle(V, Q[:, :t]) <= limit
    W = leading(factor, SIZE - t)
    assert_orthonormal(W)
    assert angle(W, Q[:, t:]) <= limit


@pytest.mark.parametrize("t", [1, 7, 20])
@pytest.mark.parametrize("gap", [1e3, 10.0])
def test_ratio_against_dense_generalized_eigenvectors(t, gap):
    """An iteration loses `λ_q / λ_t` with the `q` columns that it has."""
    old, _ = with_eigenvalues(torch.logspace(0, -4, SIZE), seed=1)
    sizes = torch.full((SIZE,), 1.0)
    sizes[t:] = 1 / (gap * old.trace() / 1e-3)
    new, _ = with_eigenvalues(sizes, seed=2)
    B = old.float().double() + RIDGE * old.trace() / SIZE * torch.eye(SIZE)
    N = new.float().double() + UNUSED * RIDGE * new.trace() / SIZE * torch.eye(SIZE)
    values, vectors = scipy.linalg.eigh(N.numpy(), B.numpy())
    V = by_ratio(full(old), full(new), t)
    assert V.shape == (SIZE, t)
    assert_orthonormal(V)
    found = values[::-1]
    columns = min(SIZE, t + max(16, t // 4))
    lost = (found[columns] / found[t - 1]) ** ITERATIONS if columns < SIZE else 0.0
    assert angle(V, torch.from_numpy(vectors[:, ::-1][:, :t].copy())) <= 10 * lost + 1e-6


def test_ratio_of_a_slow_decay_holds_nearly_all_that_can_be_held():
    """Without a gap spans may differ; what they hold may not."""
    old, _ = with_eigenvalues(torch.logspace(0, -1, 90), seed=1)
    new, _ = with_eigenvalues(torch.logspace(0, -1, 90), seed=2)
    B = old.float().double() + RIDGE * old.trace() / 90 * torch.eye(90)
    values = scipy.linalg.eigh(new.float().double().numpy(), B.numpy(), eigvals_only=True)
    V = by_ratio(full(old), full(new), 22)
    held = torch.linalg.solve(V.mT @ B @ V, V.mT @ new @ V).trace()
    assert held >= 0.99 * values[-22:].sum()


def test_what_is_new_in_fewer_directions_than_train():
    """The others are those that earlier tasks need least."""
    values = torch.ones(SIZE)
    values[: SIZE // 2] = 1e-6
    old, Q = with_eigenvalues(values)
    x = Q[:, -1:]  # Needed by earlier tasks, and used.
    V = by_ratio(full(old), full(100 * x @ x.mT), 10)
    assert_orthonormal(V)
    assert float((V.mT @ x).norm()) == pytest.approx(1, abs=1e-6)
    rest = V - x @ (x.mT @ V)
    assert torch.linalg.matrix_norm(Q[:, SIZE // 2 : -1].mT @ rest) <= 1e-3


@pytest.mark.parametrize("kind", ["full", "diagonal", "sketch"])
@pytest.mark.parametrize("old_is_zero", [True, False])
@pytest.mark.parametrize("new_is_zero", [True, False])
def test_factors_without_anything(kind, old_is_zero, new_is_zero):
    """What nobody needs is free, and what nobody uses is not asked for."""
    width = 8
    X, Y = vectors(60, SIZE, rank=5), vectors(60, SIZE, rank=4).flip(-1)
    old, new = (
        empty(kind, (SIZE,), CPU, width) if zero else made(kind, Z, width)
        for zero, Z in ((old_is_zero, X), (new_is_zero, Y))
    )
    V = by_ratio(old, new, 10)
    assert V.shape == (SIZE, 10)
    assert_orthonormal(V)
    assert_orthonormal(trailing(old, 10))
    if kind != "diagonal":
        if new_is_zero and not old_is_zero:
            assert float(share_of_trace(old, V)) <= 1e-6
        if old_is_zero and not new_is_zero:
            assert float(share_of_trace(new, V)) >= 1 - 1e-6


@pytest.mark.parametrize("kind", ["full", "diagonal", "sketch"])
@pytest.mark.parametrize("t", [SIZE, SIZE - 1])
def test_all_directions_or_all_but_one(kind, t):
    old, new = (made(kind, vectors(60, SIZE, decay=d)) for d in (0.9, 0.8))
    compared, last = by_ratio(old, new, t), trailing(old, t)
    for V in (compared, last):
        assert V.shape == (SIZE, t)
        assert_orthonormal(V)
    # All but one are all but the one that earlier tasks use most.
    first = leading(old, 1)
    assert float((last.mT @ first).norm()) == pytest.approx(float(t == SIZE), abs=1e-6)


def test_a_member_of_a_stack_that_no_row_has_reached():
    X, Y = vectors(60, 12, rank=4), vectors(60, 12, rank=3).flip(-1)
    for kind in ("full", "sketch"):
        old, new = (empty(kind, (3, 12), CPU, 6) for _ in range(2))
        for at in (0, 1):
            old.add(X, at)
        for at in (1, 2):
            new.add(Y, at)
        V = by_ratio(old, new, 5)
        assert_orthonormal(V)
        for at in range(3):
            one, other = (empty(kind, (12,), CPU, 6) for _ in range(2))
            if at < 2:
                one.add(X)
            if at > 0:
                other.add(Y)
            assert angle(V[at], by_ratio(one, other, 5)) <= 1e-6


def test_a_diagonal_chooses_indices():
    def diagonal(*values):
        return Diagonal(torch.tensor(values), torch.tensor(9.0, dtype=torch.float64))

    old, new = diagonal(4.0, 0.0, 1.0, 0.0, 2.0), diagonal(9.0, 0.0, 3.0, 1.0, 1.0)
    rows = lambda V: V.argmax(0).tolist()  # noqa: E731
    assert rows(trailing(old, 2)) == [1, 3]
    assert rows(leading(old, 2)) == [0, 4]
    # 1 / 0 beats 3 / 1, 9 / 4 and 1 / 2.
    assert rows(by_ratio(old, new, 1)) == [3]
    assert rows(by_ratio(old, new, 3)) == [0, 2, 3]
    # A row that nobody uses before one that others need more than it is used.
    assert rows(by_ratio(diagonal(4.0, 0.0, 1e6), diagonal(9.0, 0.0, 0.0), 2)) == [0, 1]
    assert rows(by_ratio(diagonal(1e6, 0.0, 4.0), diagonal(0.0, 0.0, 9.0), 2)) == [1, 2]


@pytest.mark.parametrize("t", [1, 13, SIZE - 8, SIZE - 3, SIZE - 1])
def test_of_a_sketch_the_complement_of_its_leading_eigenvectors(t):
    sketch = made("sketch", vectors(300, SIZE, decay=0.8), width=8)
    Q, _ = sketch.eigenpairs()
    V = trailing(sketch, t)
    assert V.shape == (SIZE, t)
    assert_orthonormal(V)
    # As many of the leading ones as there is place for beside t.
    away = Q[:, : min(8, SIZE - t)]
    assert torch.linalg.matrix_norm(away.mT @ V) <= 1e-12
    assert torch.equal(leading(sketch, 5), Q[:, :5])


@pytest.mark.parametrize("t", [1, 6, 11])
def test_ratio_of_sketches_that_are_exact(t):
    """Of vectors in few directions they know all, and what lacks is away from earlier needs."""
    X, Y = vectors(80, SIZE, rank=6), vectors(80, SIZE, rank=6).flip(-1)
    old, new = (made("sketch", Z, width=9) for Z in (X, Y))
    V = by_ratio(old, new, t)
    assert_orthonormal(V)
    F, N = (Z.double().mT @ Z.double() for Z in (X, Y))
    B = F + RIDGE * F.trace() / SIZE * torch.eye(SIZE)
    values, vectors_ = scipy.linalg.eigh(N.numpy(), B.numpy())
    found = min(t, 6)
    expected = torch.from_numpy(vectors_[:, ::-1][:, :found].copy())
    gap = values[::-1][found - 1] / values[::-1][found] - 1
    # Rounding of the sketches, divided by the ridge and by the gap.
    assert angle(V @ (V.mT @ torch.linalg.qr(expected).Q), expected) <= 1e-2 / min(1.0, gap)
    if t > 6:
        rest = V[:, -(t - 9) :] if t > 9 else V[:, :0]
        assert torch.linalg.matrix_norm(old.eigenpairs()[0].mT @ rest) <= 1e-10


def memory(right: Factor, left: Factor, reads: str = "right") -> Memory:
    return Memory(
        {"w.left": left, "w.right": right}, {"w": Sides("w.left", "w.right", reads)}, {"": 1}
    )


def test_the_gain_is_what_inputs_lack_in_the_basis():
    values = torch.ones(SIZE)
    values[:10] = 0.01
    A, Q = with_eigenvalues(values)
    S = full(torch.eye(6))
    old = memory(full(A), S)
    directions = Directions(old, None)
    U, V = torch.eye(6, dtype=torch.float64)[:, :3], trailing(full(A), 10)
    share = 10 * 0.01 / float(values.sum())
    expected = math.sqrt(1 / share)
    assert directions.gain("w", U, V) == pytest.approx(expected, rel=1e-5)
    # Of normal inputs, E|x|_1 goes with the roots of the diagonal: a step of signs moves the output
    # on its own input as far as a dense one, but for how uneven the diagonal of A is.
    m, t = 6, 10
    F = A.double()
    ours = (
        expected * math.sqrt(m * SIZE) / t * math.sqrt(t) * (V.mT @ F @ V).diagonal().sqrt().sum()
    )
    dense = math.sqrt(m) * F.diagonal().sqrt().sum()
    uneven = math.sqrt(SIZE * float(F.trace())) / float(F.diagonal().sqrt().sum())
    assert float(ours / dense) == pytest.approx(uneven, rel=1e-5)
    assert uneven < 1.02
    # With rows of the new task it is its inputs that count.
    new = memory(full(torch.eye(SIZE)), S)
    plain = math.sqrt(SIZE / 10)
    assert Directions(old, new).gain("w", U, V) == pytest.approx(plain, rel=1e-5)
    # On the other side where the weight is read from there.
    turned = Directions(memory(S, full(A), "left"), None)
    assert turned.gain("w", V, U) == pytest.approx(expected, rel=1e-5)
    assert Directions(memory(full(A), S, "both"), None).gain("w", U, V) == 1
    # Capped, and 1 where no input is met at all.
    tiny = memory(full(Q @ (values - 0.01 + 1e-9).diag().double() @ Q.mT), S)
    assert Directions(tiny, None).gain("w", U, V) == LARGEST_GAIN
    eye = torch.eye(SIZE, dtype=torch.float64)
    nothing = memory(full(eye[:, 10:] @ eye[:, 10:].mT), S)
    assert Directions(nothing, None).gain("w", U, eye[:, :10]) == 1


def test_the_gain_of_a_stack_is_that_of_all_its_inputs():
    stack = torch.stack([torch.eye(SIZE), 3 * torch.eye(SIZE), torch.zeros(SIZE, SIZE)])
    count = torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64)
    S = Full(torch.eye(6).expand(3, 6, 6).clone(), count)
    V = torch.eye(SIZE, dtype=torch.float64)[:, :10].expand(3, SIZE, 10)
    directions = Directions(memory(Full(stack, count), S), None)
    # A member that no input has reached says nothing.
    gain = directions.gain("w", V[:, :6, :2], V)
    assert gain == pytest.approx(math.sqrt(SIZE / 10), rel=1e-6)


def test_shares_are_those_of_the_trace():
    values = torch.arange(1, SIZE + 1).float()
    F, Q = with_eigenvalues(values)
    assert float(share_of_trace(full(F), Q[:, :4])) == pytest.approx(10 / 820, rel=1e-5)
    old = memory(full(F), full(torch.eye(6)))
    directions = Directions(old, None)
    U = torch.eye(6, dtype=torch.float64)[:, :3]
    assert directions.touched("w", U, Q[:, :4]) == pytest.approx(0.5 * 10 / 820, rel=1e-5)
