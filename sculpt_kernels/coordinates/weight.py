"""Weights that move through coordinates in layers other than a plain dense one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sculpt_kernels import checks
from sculpt_kernels.coordinates.linear import scaled_
from sculpt_kernels.operation import operation, refuse_batched_gradient, refuse_second_derivatives
from sculpt_kernels.shards import whole


@operation(autocast=True)
def compact_weight(
    W: Tensor, U: Tensor | None, V: Tensor | None, C: Tensor, *, scale: float = 1.0
) -> Tensor:
    """`W` itself, differentiable in the coordinates `C` of `W = W₀ + scale U C Vᵀ`.

    For layers that use their weight in ways of their own, such as stacks of expert matrices: the
    values of `C` are not read, and the backward compresses the weight's gradient,
    `dC = scale Uᵀ dW V`. `dW` is formed by the layer and dropped again at once; nothing keeps it.

    Args:
        W: `(..., m, n)`, must not require grad: it moves through `C` alone.
        U: `(..., m, r)`; V: `(..., n, s)`; constants; `None` is the identity, `r = m` or `s = n`.
        C: `(..., r, s)`, any floating dtype; its gradient has that dtype.
        scale: finite, above 0; `√(mn / rs)` lets a step of the coordinates move the weight as far
            as one of its entries would, see `compact_linear`.

    Returns:
        A view of `W`, in its dtype.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    checks.compact(W, U, V, C, scale)
    out: Tensor = _CompactWeight.apply(W, U, V, C, scale)  # type: ignore[no-untyped-call]
    return out


@operation(autocast=True)
def compact_embedding(
    ids: Tensor,
    W: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    C: Tensor,
    *,
    padding_idx: int | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Rows `ids` of `W`, differentiable in the coordinates `C` of `W = W₀ + scale U C Vᵀ`.

    The backward gives `dC = scale U[ids]ᵀ (dy V)` from the rows that were looked up; the gradient
    of the whole table is never formed.

    Args:
        ids: integers in `[0, m)`, any shape.
        W: `(m, n)`, must not require grad: it moves through `C` alone.
        U: `(m, r)`; V: `(n, s)`; constants; `None` is the identity, `r = m` or `s = n`.
        C: `(r, s)`, any floating dtype; its gradient has that dtype.
        padding_idx: rows with this id give no gradient.
        scale: as for `compact_weight`.

    Returns:
        `(*ids.shape, n)` in the dtype of `W`.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    checks.compact(W, U, V, C, scale, like="(m, n)")
    if torch.is_floating_point(ids):
        raise TypeError(f"ids must be integers; got {checks.describe(ids)}")
    out: Tensor = _CompactEmbedding.apply(  # type: ignore[no-untyped-call]
        ids, W, U, V, C, padding_idx, scale
    )
    return out


class _CompactWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, W: Tensor, U: Tensor | None, V: Tensor | None, C: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(U, V)
        ctx.C_dtype, ctx.scale = C.dtype, scale
        return W.view_as(W)

    @staticmethod
    def backward(ctx: Any, dW: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("compact_weight")
        U, V = ctx.saved_tensors
        with torch.autocast(dW.device.type, enabled=False):
            # The longer side first, so that what stays in between is small.
            if U is not None and (V is None or dW.shape[-2] >= dW.shape[-1]):
                dC = whole(U, dW.dtype).mT @ dW
                dC = dC if V is None else dC @ whole(V, dW.dtype)
            else:
                dC = dW if V is None else dW @ whole(V, dW.dtype)
                dC = dC if U is None else whole(U, dW.dtype).mT @ dC
            if U is None and V is None and ctx.scale != 1.0:
                dC = dC.clone()  # `dW` is the layer's
            dC = scaled_(dC, ctx.scale, ctx.C_dtype)
        return None, None, None, dC, None


class _CompactEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        W: Tensor,
        U: Tensor | None,
        V: Tensor | None,
        C: Tensor,
        padding_idx: int | None,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(ids, U, V)
        ctx.C_shape, ctx.C_dtype = C.shape, C.dtype
        ctx.padding_idx, ctx.scale = padding_idx, scale
        return torch.nn.functional.embedding(ids, W)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("compact_embedding")
        refuse_batched_gradient("compact_embedding", dy)
        ids, U, V = ctx.saved_tensors
        rows, ids = dy.flatten(0, -2), ids.flatten()
        with torch.autocast(dy.device.type, enabled=False):
            if ctx.padding_idx is not None:
                rows = rows.masked_fill((ids == ctx.padding_idx).unsqueeze(-1), 0)
            image = rows if V is None else rows @ whole(V, dy.dtype)
            if U is None:
                dC = image.new_zeros(ctx.C_shape, dtype=ctx.C_dtype)
                dC.index_add_(0, ids, image.to(ctx.C_dtype))
            else:
                dC = whole(U)[ids].to(dy.dtype).mT @ image
            dC = scaled_(dC, ctx.scale, ctx.C_dtype)
        return None, None, None, None, dC, None, None
