# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""The last pass for many matrices that lie anywhere, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sculpt_kernels.triton import launcher
from sculpt_kernels.triton.tiles import TileConfig
from sculpt_kernels.triton.update import launch


def update_many_(
    Xs: Sequence[Tensor],
    A: Tensor | Sequence[Tensor],
    B: Tensor | Sequence[Tensor],
    *,
    alpha: float | Tensor,
    A2: Tensor | Sequence[Tensor] | None,
    B2: Tensor | Sequence[Tensor] | None,
    bases: Sequence[Tensor] | None,
    rounding: str,
    seeds: Tensor | None,
    config: TileConfig | None = None,
) -> None:
    """`update_` of many matrices of one layout in one launch, each where it lies.

    Args:
        Xs: `(m, n)` each, of one dtype and one set of strides, aligned to 16 bytes.
        A, A2: one `(count, m, k)` tensor, or `(m, k)` each; B, B2: likewise with `n`. Lists have
            one set of strides and are aligned to 16 bytes.
        bases: as `Xs`, or `None` for `Xs` themselves.
        seeds: `(count,)`, int64, on the device, for `"stochastic"`.
    """
    device = Xs[0].device
    both = A2 is not None and B2 is not None
    lists: dict[str, Any] = {
        "x": Xs,
        "s": Xs if bases is None else bases,
        "a": A,
        "b": B,
        "a2": A2 if both else A,
        "b2": B2 if both else B,
    }
    found: dict[str, Any] = {}
    for name, value in lists.items():
        if isinstance(value, Tensor):
            found[name] = value
        else:
            addresses = launcher.address_table(tuple(X.data_ptr() for X in value), device)
            found[name] = launcher.Listed(value[0][None], addresses)
    config = launcher.choose("update", found["a"].dtype, device, config)
    launch(
        found,
        len(Xs),
        config,
        alpha=launcher.number(alpha, device),
        seed=launcher.whole(0, device) if seeds is None else seeds,
        first_matrix=0,
        SOURCE=True,
        SEGMENTS=0 if not found["a"].shape[-1] else 2 if both else 1,
        STOCHASTIC=rounding == "stochastic",
    )
