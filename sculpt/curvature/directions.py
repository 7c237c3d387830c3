"""The trainable bases of a weight from its factors: which directions earlier tasks do not need.

`F_old` is a factor of everything that must not be forgotten, `F_new` the same of the task that
begins, `d` their size. Two choices of `t` directions:

- trailing: the eigenvectors of `F_old` with the smallest eigenvalues;
- ratio: the leading solutions of `F_new v = λ (F_old + ε tr(F_old)/d I) v`, orthonormalised: what
  the new task uses most for each unit that the earlier ones need. To `F_new` a little of the
  identity is added, too: what it does not use at all is told apart by the earlier needs.

Of a sketch the leading eigenvectors are known and the rest is not told apart, so that directions
beyond its rank are random ones of the complement.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sculpt.curvature.factors import Diagonal, Factor, Full, Sketch
from sculpt.curvature.memory import Memory
from sculpt_kernels import orthonormalize, split

RIDGE = 1e-3
"""`ε`; that of what is new is smaller by `UNUSED`."""

UNUSED = 1e-3

ITERATIONS = 3

LARGEST_GAIN = 30.0
"""Directions that no input uses would have an infinite one."""


class Directions:
    """The bases of every target, found once for each factor that targets share.

    Args:
        old: what earlier tasks use.
        new: what the task that begins uses; `None` where there are no rows of it.
    """

    def __init__(self, old: Memory, new: Memory | None) -> None:
        self.old, self.new = old, new
        self._found: dict[tuple[str, str | None, int], Tensor] = {}

    def has(self, name: str) -> bool:
        return self.old.of(name) is not None

    def compares(self, name: str) -> bool:
        """Whether the bases of this target are chosen by the ratio."""
        return self.new is not None and self.new.of(name) is not None

    def trainable(self, name: str, t: int) -> tuple[Tensor, Tensor]:
        """Left and right basis `(..., m, t)`, `(..., n, t)` of what may train."""
        keys = self.old.sides[name]
        newer = self.new.sides[name] if self.compares(name) and self.new is not None else None
        return (
            self._trainable(keys.left, None if newer is None else newer.left, t),
            self._trainable(keys.right, None if newer is None else newer.right, t),
        )

    def _trainable(self, key: str, newer: str | None, t: int) -> Tensor:
        if (key, newer, t) not in self._found:
            old = self.old.factors[key]
            if self.new is None or newer is None:
                self._found[key, newer, t] = trailing(old, t)
            else:
                self._found[key, newer, t] = by_ratio(old, self.new.factors[newer], t)
        return self._found[key, newer, t]

    def preserved(self, name: str, h: int) -> tuple[Tensor, Tensor]:
        """Left and right basis `(..., m, h)`, `(..., n, h)` of what earlier tasks use most."""
        keys = self.old.sides[name]
        left, right = (leading(self.old.factors[key], h) for key in (keys.left, keys.right))
        return left, right

    def touched(self, name: str, U: Tensor, V: Tensor, *, outside: bool = False) -> float:
        """Share of `tr S tr A` of earlier tasks in the span of both bases; the most of a stack.

        outside: of neither.
        """
        keys = self.old.sides[name]
        left = share_of_trace(self.old.factors[keys.left], U)
        right = share_of_trace(self.old.factors[keys.right], V)
        return float(((1 - left) * (1 - right) if outside else left * right).max())

    def used(self, name: str, basis: Tensor) -> float:
        """Share of the inputs' second moment in the span of the basis on their side.

        That of the task that begins, where its rows are known.
        """
        memory = self.new if self.new is not None and self.compares(name) else self.old
        keys = memory.sides[name]
        factor = memory.factors[keys.left if keys.reads == "left" else keys.right]
        whole = float(factor.trace().sum())
        return float(factor.quadratic(basis.mT).sum()) / whole if whole > 0 else 0.0

    def gain(self, name: str, U: Tensor, V: Tensor) -> float:
        """`√(tr A / tr Vᵀ A V)` of the basis `V` `(d, t)` on the side of the inputs.

        An optimizer that normalises its elements turns the gradient `g xᵀ` of an input into signs.
        A dense step then moves the output on `x` by `lr √m ‖x‖₁`, one of coordinates, scaled by
        `γ = √(mn)/t`, by `lr γ √t ‖Vᵀx‖₁`: as far, but for `‖Vᵀx‖ / ‖x‖`. This makes up for that,
        in the mean over inputs with the second moment `A`. 1 where inputs are on both sides, or
        the basis meets none; at most `LARGEST_GAIN`.
        """
        reads = self.old.sides[name].reads
        if reads == "both":
            return 1.0
        share = self.used(name, U if reads == "left" else V)
        return min(LARGEST_GAIN, 1 / math.sqrt(share)) if share > 0 else 1.0


def trailing(old: Factor, t: int) -> Tensor:
    """Basis `(..., d, t)` of the directions that `old` uses least, float64, orthonormal columns."""
    if isinstance(old, Full):
        return _each(old.total, lambda F: _extreme(F, t, leading=False))
    if isinstance(old, Diagonal):
        return _units(-old.total, t)
    assert isinstance(old, Sketch)
    Q, _ = old.eigenpairs()
    return _complete(Q[..., :0], t, away_from=Q)


def leading(old: Factor, h: int) -> Tensor:
    """Basis `(..., d, h)` of the directions that `old` uses most, as `trailing`.

    Of a sketch at most as many as it has columns.
    """
    if isinstance(old, Full):
        return _each(old.total, lambda F: _extreme(F, h, leading=True))
    if isinstance(old, Diagonal):
        return _units(old.total, h)
    assert isinstance(old, Sketch)
    Q, _ = old.eigenpairs()
    return Q[..., :h]


def by_ratio(old: Factor, new: Factor, t: int, ridge: float = RIDGE) -> Tensor:
    """Basis `(..., d, t)` of what `new` uses most beside what `old` needs, as `trailing`."""
    if isinstance(old, Diagonal):
        assert isinstance(new, Diagonal)
        needs, uses = old.total.double(), new.total.double()
        needed, used = (_floors(F.mean(-1, keepdim=True), ridge) for F in (needs, uses))
        return _units((uses + UNUSED * used) / (needs + needed), t)
    if isinstance(old, Full):
        pairs = torch.stack([old.total, new.total], dim=-3)
        return _each(pairs, lambda pair: _ratio(pair[0].double(), pair[1].double(), t, ridge), 3)
    assert isinstance(old, Sketch)
    assert isinstance(new, Sketch)
    if old.count.ndim == 0:
        return _ratio_of_sketches(old, new, t, ridge)
    members = zip(old.members(), new.members(), strict=True)
    return torch.stack([_ratio_of_sketches(*pair, t, ridge) for pair in members])


def _floors(mean: Tensor, ridge: float) -> Tensor:
    """What is added to a factor whose eigenvalues have this mean; 1 to one that is zero."""
    return torch.where(mean > 0, ridge * mean, 1.0)


def share_of_trace(factor: Factor, V: Tensor) -> Tensor:
    """`tr(Vᵀ F V) / tr F` `(...)` of a basis `V` `(..., d, t)`, float64; 0 where `F` is zero."""
    trace = factor.trace()
    share = factor.quadratic(V.mT) / trace.clamp_min(torch.finfo(trace.dtype).tiny)
    return torch.where(trace > 0, share, 0.0)


def trailing_shares(factor: Factor) -> Tensor:
    """Share of `tr F` in the `1, 2, ..., d` directions that `F` uses least, `(d,)`, float64."""
    shares = eigenvalues(factor).cumsum(0)
    return shares / shares[-1].clamp_min(torch.finfo(shares.dtype).tiny)


def eigenvalues(factor: Factor) -> Tensor:
    """Shares of `tr F` `(d,)` along its eigenvectors, rising, float64; the mean over a stack.

    What a sketch does not tell apart counts as alike.
    """
    if isinstance(factor, Sketch):
        _, known = factor.eigenpairs()
        d, r = factor.total.shape[-2:]
        rest = (factor.trace() - known.sum(-1)).clamp_min(0) / max(d - r, 1)
        values = torch.cat([known, rest[..., None].expand(*rest.shape, d - r)], dim=-1)
    elif isinstance(factor, Diagonal):
        values = factor.total.double()
    else:
        values = torch.linalg.eigvalsh(factor.total.double()).clamp_min(0)
    values = values.sort(dim=-1).values
    shares = values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    return shares.reshape(-1, shares.shape[-1]).mean(0)


def _ratio(old: Tensor, new: Tensor, t: int, ridge: float) -> Tensor:
    """By subspace iteration with `B⁻¹ F_new` on a few columns more, `B` as above."""
    d = len(old)
    B = old.clone()
    # The sums are float32: what is smaller than their rounding may be negative.
    rounding = 8 * torch.finfo(torch.float32).eps * torch.linalg.matrix_norm(old)
    B.diagonal().add_(torch.maximum(_floors(old.trace() / d, ridge), rounding))
    new = new.clone()
    new.diagonal().add_(UNUSED * _floors(new.trace() / d, ridge))
    root = torch.linalg.cholesky(B)
    V = _random(d, _columns(d, t), B)
    for _ in range(ITERATIONS):
        V = orthonormalize(torch.cholesky_solve(new @ V, root))
    small = torch.linalg.cholesky(V.mT @ (B @ V))
    inner = torch.linalg.solve_triangular(small, V.mT @ (new @ V), upper=False)
    inner = torch.linalg.solve_triangular(small, inner.mT, upper=False)
    _, Y = torch.linalg.eigh((inner + inner.mT) / 2)
    return orthonormalize(V @ torch.linalg.solve_triangular(small.mT, Y[:, -t:], upper=True))


def flops_of_ratio(factor: Factor, t: int) -> int:
    """FLOPs of `by_ratio`: of products, Cholesky factors and solutions with them."""
    *stack, d, width = factor.total.shape
    if isinstance(factor, Diagonal):
        return 0
    if isinstance(factor, Sketch):  # two sketches to eigenvectors, and products with those
        return math.prod(stack) * d * (12 * width**2 + 4 * width * t)
    p = _columns(d, t)
    iteration = 4 * d * d * p + 4 * d * p * p  # a product, a solution, a basis
    return math.prod(stack) * (d**3 // 3 + ITERATIONS * iteration + 4 * d * d * p + 8 * d * p * p)


def _columns(d: int, t: int) -> int:
    """Of the subspace that is iterated."""
    return min(d, t + max(16, t // 4))


def _random(d: int, count: int, like: Tensor) -> Tensor:
    """Independent standard normal numbers `(d, count)`, the same ones everywhere."""
    generator = torch.Generator().manual_seed(d)
    return torch.randn(d, count, generator=generator, dtype=like.dtype).to(like.device)


def _extreme(F: Tensor, t: int, *, leading: bool) -> Tensor:
    """The eigenvectors `(d, t)` of the largest or smallest eigenvalues of a matrix `F >= 0`."""
    d = len(F)
    if t == d:
        return torch.eye(d, dtype=torch.float64, device=F.device)
    rank, part = (t, "high") if leading else (d - t, "low")
    return split(F.double(), rank=rank, part=part).V


def _ratio_of_sketches(old: Sketch, new: Sketch, t: int, ridge: float) -> Tensor:
    """All solutions with `λ > 0` are in the span of `B⁻¹ Q_new`, with `B` as above."""
    Q, values = old.eigenpairs()
    floor = _floors(old.trace() / len(Q), ridge)
    P, weights = new.eigenpairs()
    found = min(t, int((weights > 0).sum()))
    X = P[:, :found] if found == 0 else P * weights.sqrt()
    # B⁻¹ X, where B = Q diag(values) Qᵀ + floor I.
    inverse = X / floor - Q @ ((values / (floor * (values + floor)))[:, None] * (Q.mT @ X))
    inner = X.mT @ inverse
    _, Y = torch.linalg.eigh((inner + inner.mT) / 2)
    V = inverse @ Y[:, Y.shape[-1] - found :]
    return _complete(orthonormalize(V) if found else V, t, away_from=Q)


def _complete(V: Tensor, t: int, away_from: Tensor) -> Tensor:
    """`V` and the random directions that it lacks of `t`, away from as many others as can be.

    away_from: the most important first.
    """
    d, found = V.shape[-2:]
    if found == t:
        return V
    more = _random(d, t - found, V).expand(*V.shape[:-1], t - found)
    known = torch.cat([V, away_from[..., : d - t]], dim=-1)
    known = orthonormalize(known) if known.shape[-1] else known
    for _ in range(2):
        more = more - known @ (known.mT @ more)
        more = orthonormalize(more)
    return torch.cat([V, more], dim=-1)


def _units(weights: Tensor, t: int) -> Tensor:
    """Unit vectors `(..., d, t)` of the `t` largest weights."""
    at = weights.topk(t, dim=-1).indices.sort(dim=-1).values
    basis = torch.zeros(*weights.shape, t, dtype=torch.float64, device=weights.device)
    return basis.scatter_(-2, at[..., None, :], 1.0)


def _each(stack: Tensor, function: Callable[[Tensor], Tensor], dims: int = 2) -> Tensor:
    """`function` of every matrix of a stack, or of every `dims - 1` of them."""
    if stack.ndim == dims:
        return function(stack)
    return torch.stack([_each(one, function, dims) for one in stack])
