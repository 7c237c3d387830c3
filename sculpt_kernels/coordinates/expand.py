"""Weights brought up to date with their coordinates in a pair of bases: `W += alpha U C Vᵀ`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sculpt_kernels import checks, shards
from sculpt_kernels.dispatch import choose, unsupported
from sculpt_kernels.operation import is_traced, number_and_tensor, operation
from sculpt_kernels.plan.projections import arrange
from sculpt_kernels.products import compute_dtype, matrices, panels_of
from sculpt_kernels.rounding import store


@operation()
def expand_add_(
    W: Tensor,
    C: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    *,
    alpha: float | Tensor = 1.0,
    rounding: str = "nearest",
    seed: int | Tensor | None = None,
    base: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`W += alpha U C Vᵀ` in place; with `base`, `W = base + alpha U C Vᵀ`. Returns `W`.

    The sum is formed in float32 (float64 for float64 `W`) and rounded once. `"stochastic"` rounds
    up or down at random so that the mean is exact; equal seeds give equal bits on every backend.

    Args:
        W: `(..., m, n)`, any strides; written in place. A `DTensor` is written shard by shard, with
            other random bits in every shard; the others may be divided too.
        C: `(..., r, s)`, any floating dtype.
        U: `(..., m, r)`; V: `(..., n, s)`; the dtype of `W` or float32, both alike. One of them
            may be `None`, the identity: `r = m`, or `s = n`.
        alpha: a number or a 0-d tensor.
        rounding: `"nearest"`, or `"stochastic"` for bfloat16 and float16 `W`.
        seed: 64-bit int or 0-d int64 tensor; required by and only for `"stochastic"`.
        base: `(..., m, n)`, dtype of `W` or float32: start from these values, not from `W`.

    Raises:
        TypeError, ValueError: an argument does not fit, or a basis on the CPU holds NaN; raised
            before `W` is changed.
        RuntimeError: the backend cannot run here.
    """
    if not shards.is_divided(W) and is_traced(W):
        torch.ops.sculpt_kernels.expand_add_(
            W, C, U, V, *number_and_tensor(alpha), rounding, *number_and_tensor(seed), base,
            backend,
        )  # fmt: skip
        return W
    expansion = _Expansion(W, C, U, V, alpha, rounding, seed, base)
    if shards.is_divided(W):
        expansion = expansion.of_shard()
    else:
        expansion.check()
    expansion.run(expansion.choose(backend))
    return W


@operation()
def expand_add_many_(
    Ws: Sequence[Tensor],
    Cs: Sequence[Tensor],
    Us: Sequence[Tensor | None],
    Vs: Sequence[Tensor | None],
    *,
    alpha: float | Tensor = 1.0,
    rounding: str = "nearest",
    seeds: Tensor | None = None,
    bases: Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> None:
    """`expand_add_` of every weight of a list, in place.

    Weights of one shape, layout, dtype and rank go into common kernel launches where a kernel does
    that. The results are those of `expand_add_` one by one.

    Args:
        Ws, Cs, Us, Vs: lists of one length, as `W`, `C`, `U`, `V` of `expand_add_`.
        alpha, rounding, backend: as for `expand_add_`, alike for all.
        seeds: `(len(Ws),)`, int64, for and only for `"stochastic"`: one seed for each weight.
        bases: start from these values, not from `Ws`.

    Raises:
        TypeError, ValueError: an argument does not fit (named with its index), two weights share
            memory, or the lists differ in length; raised before any weight is changed.
        RuntimeError: the backend cannot run here.
    """
    Ws = checks.tensor_list("Ws", Ws)
    lists = {"Cs": Cs, "Us": Us, "Vs": Vs} | ({} if bases is None else {"bases": bases})
    for name, value in lists.items():
        if len(value) != len(Ws):
            raise ValueError(f"{name} must have {len(Ws)} entries, one for each of Ws; "
                             f"got {len(value)}")  # fmt: skip
    if seeds is not None and (seeds.ndim != 1 or len(seeds) != len(Ws)):
        raise ValueError(f"seeds must have shape ({len(Ws)},); got {checks.describe(seeds)}")
    divided = any(shards.is_divided(W) for W in Ws)
    if Ws and not divided and is_traced(Ws[0]):
        torch.ops.sculpt_kernels.expand_add_many_(
            Ws, Cs, Us, Vs, *number_and_tensor(alpha), rounding, seeds, bases or [], backend
        )
        return
    expansions, chosen = [], []
    for i, (W, C, U, V) in enumerate(zip(Ws, Cs, Us, Vs, strict=True)):
        seed, base = (None if each is None else each[i] for each in (seeds, bases))
        expansion = _Expansion(W, C, U, V, alpha, rounding, seed, base)
        with checks.within(f"matrix {i}"):
            if shards.is_divided(W):
                expansion = expansion.of_shard()
            else:
                expansion.check()
            chosen.append(expansion.choose(backend))
        expansions.append(expansion)
    checks.disjoint("Ws", [expansion.W for expansion in expansions])
    if set(chosen) == {"triton"} and not divided and not Ws[0].is_meta:
        from sculpt_kernels.coordinates import triton_expand

        with torch.no_grad():
            triton_expand.expand_add_many_(Ws, Cs, Us, Vs, alpha, rounding, seeds, bases)
        return
    for one, expansion in zip(chosen, expansions, strict=True):
        expansion.run(one)


@dataclass(frozen=True)
class _Expansion:
    """The arguments of `expand_add_` but for the backend."""

    W: Tensor
    C: Tensor
    U: Tensor | None
    V: Tensor | None
    alpha: float | Tensor
    rounding: str
    seed: int | Tensor | None
    base: Tensor | None

    def _check_values(self) -> None:
        """What is refused for whole and for divided weights alike."""
        W, base = self.W, self.base
        checks.matrix("W", W)
        checks.bases_and_coordinates(W, self.U, self.V, self.C)
        if base is not None:
            checks.matrix("base", base)
            if base.shape != W.shape:
                raise ValueError(
                    f"base must have the shape {tuple(W.shape)} of W; got {checks.describe(base)}"
                )
        checks.scalar("alpha", self.alpha, W)
        checks.rounding(self.rounding, self.seed, "W", W)

    def check(self) -> None:
        """Refuse arguments that `expand_add_` cannot take, before anything is changed."""
        self._check_values()
        W, U, V = self.W, self.U, self.V
        if U is None and V is None:
            raise ValueError(
                "U and V must not both be None; for W += alpha C use W.add_(C, alpha=...)"
            )
        read = {"C": self.C, "U": U, "V": V, "base": self.base}
        checks.no_wrapper(W=W, **read)
        checks.same_device(W=W, **read)
        if U is not None and V is not None:
            checks.same_dtype(U=U, V=V)
        for name, X in (("U", U), ("V", V), ("base", self.base)):
            if X is not None and X.dtype not in (W.dtype, compute_dtype(W.dtype)):
                raise TypeError(
                    f"{name} must have the dtype {checks.dtype_name(W.dtype)} of W or "
                    f"{checks.dtype_name(compute_dtype(W.dtype))}; got {checks.describe(X)}"
                )
            if X is not None and name != "base":
                checks.free_of_nan(name, X)
        checks.writable("W", W)
        checks.no_overlap("W", W, **read)

    @torch.no_grad()
    def of_shard(self) -> _Expansion:
        """What this process does: what travels is `C`, and the basis of the side that is whole.

        What is elsewhere than the shard, which may be offloaded, follows it.
        """
        self._check_values()
        assert shards.is_divided(self.W)
        division = shards.Division.of("W", self.W)
        X = self.W.to_local()
        checks.writable("W", X)
        factors = division.factors(self.U, self.C, self.V)
        U, C, V = (None if part is None else part.to(X.device) for part in factors)
        assert C is not None
        base = self.base
        if base is not None:
            base = division.along(base, division.axis).to(X.device)
        seed = None if self.seed is None else self.seed + division.coordinate
        return replace(self, W=X, C=C, U=U, V=V, seed=seed, base=base)

    def choose(self, backend: str) -> str:
        """Which implementation takes these arguments, which have been checked."""

        def refused() -> str | None:
            return unsupported(self.W, self.C, self.U, self.V, self.base)

        return choose(backend, self.W.device, refused, self.rounding)

    @torch.no_grad()
    def run(self, chosen: str) -> None:
        """By the chosen implementation; the arguments have been checked."""
        W, C, U, V, base = self.W, self.C, self.U, self.V, self.base
        if W.is_meta or W.numel() == 0:
            return
        if chosen == "triton":
            from sculpt_kernels.coordinates import triton_expand

            triton_expand.expand_add_(W, C, U, V, self.alpha, self.rounding, self.seed, base)
            return
        scaled = C.to(compute_dtype(W.dtype)) * self.alpha
        for index, (X, core, A, B, start) in enumerate(matrices(W, scaled, U, V, base)):
            _expand_add_matrix(X, core, A, B, start, self.seed, index * W.shape[-2], chosen)


def _expand_add_matrix(
    W: Tensor,
    C: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    base: Tensor | None,
    seed: int | Tensor | None,
    row0: int,
    backend: str,
) -> None:
    m, n = W.shape
    wide = C.dtype
    empty = C.numel() == 0
    V = None if V is None else V.to(wide)
    both = U is not None and V is not None and not empty
    if both and arrange("core", "none", m, n, *C.shape, False).transposed:
        assert V is not None
        C, V = torch.mm(C, V.t()), None
    if W.dtype == wide:
        # Products come first: where they find no memory, `W` is still as it was.
        factors = None if empty else _factors(C, None if U is None else U.to(wide), V)
        if base is not None:
            W.copy_(base)
        if factors is not None:
            W.addmm_(*factors)
        return
    source = W if base is None else base
    for rows in panels_of(m, n):
        total = source[rows].to(wide, copy=True)
        if not empty:
            core, A = (C[rows], None) if U is None else (C, U[rows].to(wide))
            total.addmm_(*_factors(core, A, V))
        store(W[rows], total, seed, row0 + rows.start, backend)


def _factors(C: Tensor, U: Tensor | None, V: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two matrices whose product is `U C Vᵀ`."""
    if V is None:
        assert U is not None
        return U, C
    return C if U is None else torch.mm(U, C), V.t()
