"""Many weights brought up to date with their coordinates at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sculpt_kernels import checks
from sculpt_kernels.coordinates.coordinates import (
    check_expand_add,
    expand_add_,
    expand_add_backend,
    run_expand_add,
)
from sculpt_kernels.operation import is_traced, number_and_tensor, operation
from sculpt_kernels.shards import is_divided

_Call = tuple[
    Tensor,
    Tensor,
    Tensor | None,
    Tensor | None,
    float | Tensor,
    str,
    Tensor | None,
    Tensor | None,
]


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
    if any(is_divided(W) for W in Ws):
        for i, (W, C, U, V) in enumerate(zip(Ws, Cs, Us, Vs, strict=True)):
            seed, base = (None if each is None else each[i] for each in (seeds, bases))
            with checks.within(f"matrix {i}"):
                expand_add_(
                    W, C, U, V, alpha=alpha, rounding=rounding, seed=seed, base=base,
                    backend=backend,
                )  # fmt: skip
        return
    if Ws and is_traced(Ws[0]):
        torch.ops.sculpt_kernels.expand_add_many_(
            Ws, Cs, Us, Vs, *number_and_tensor(alpha), rounding, seeds, bases or [], backend
        )
        return
    calls: list[_Call] = [
        (W, C, U, V, alpha, rounding, None if seeds is None else seeds[i],
         None if bases is None else bases[i])
        for i, (W, C, U, V) in enumerate(zip(Ws, Cs, Us, Vs, strict=True))
    ]  # fmt: skip
    chosen = []
    for i, call in enumerate(calls):
        with checks.within(f"matrix {i}"):
            check_expand_add(*call)
        W, C, U, V, _, _, _, base = call
        chosen.append(expand_add_backend(backend, W, C, U, V, rounding, base))
    checks.disjoint("Ws", Ws)
    if set(chosen) == {"triton"} and not Ws[0].is_meta:
        from sculpt_kernels.coordinates import triton_expand

        with torch.no_grad():
            triton_expand.expand_add_many_(Ws, Cs, Us, Vs, alpha, rounding, seeds, bases)
        return
    for one, call in zip(chosen, calls, strict=True):
        run_expand_add(one, *call)
