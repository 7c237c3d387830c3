"""The dense layer of compact training: an ordinary forward, a backward that never forms `dW`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sculpt_kernels import checks
from sculpt_kernels.operation import operation, refuse_batched_gradient, refuse_second_derivatives
from sculpt_kernels.shards import whole


@operation(autocast=True)
def compact_linear(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    U: Tensor | None,
    V: Tensor | None,
    C: Tensor,
    *,
    scale: float = 1.0,
) -> Tensor:
    """`y = x Wᵀ + bias`, differentiable in the coordinates `C` of `W = W₀ + scale U C Vᵀ`.

    The forward is one dense product with the current weight, which already contains
    `scale U C Vᵀ`: the values of `C` are not read. The backward gives

        dx = dy W        dbias = Σ dy        dC = scale (dy U)ᵀ (x V)

    so `dW` (`m x n`) is never formed and `x V` (`T x s`) is saved instead of `x` (`T x n`), before
    the dense product is computed: non-reentrant checkpointing, which stops at the last saved tensor
    of what it computes anew, leaves out the dense product of a last layer.

    Args:
        x: `(..., n)`, the dtype of `W` (under autocast everything follows autocast).
        W: `(m, n)`, any strides, must not require grad: it moves through `C` alone.
        bias: `(m,)` or `None`; may require grad.
        U: `(m, r)`; V: `(n, s)`; constants, cast to the dtype of the computation where needed; a
            `DTensor` is gathered when it is used, `V` in the forward and `U` in the backward.
            `None` is the identity: `r = m`, or `s = n` (then `x` itself is saved).
        C: `(r, s)`, any floating dtype; its gradient has that dtype.
        scale: finite, above 0. An optimizer such as Adam moves each entry by about its rate,
            whatever the gradient's size. `√(mn / rs)` makes a step of all `r s` coordinates move
            the weight as far, in the Frobenius norm, as the same step of its `m n` entries would.

    Returns:
        `(..., m)`.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    checks.compact(W, U, V, C, scale, like="(m, n)")
    if x.shape[-1:] != W.shape[-1:]:
        raise ValueError(
            f"x must have shape (..., {W.shape[-1]}) to fit W {tuple(W.shape)}; "
            f"got {checks.describe(x)}"
        )
    if bias is not None and bias.shape != W.shape[:1]:
        raise ValueError(f"bias must have shape ({W.shape[0]},); got {checks.describe(bias)}")
    if x.ndim == 1:
        return compact_linear(x.unsqueeze(0), W, bias, U, V, C, scale=scale).squeeze(0)
    if not torch.is_grad_enabled():
        C = C.detach()  # no backward will come, so `x V` is not needed
    shape = _Backward.apply(x, W, bias, U, V, C, scale)  # type: ignore[no-untyped-call]
    out: Tensor = _Forward.apply(x.detach(), W, bias, shape)  # type: ignore[no-untyped-call]
    return out


def scaled_(gradient: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """`scale * gradient` in `dtype`, multiplied in the wider of both; may change `gradient`."""
    if scale != 1.0:
        gradient = gradient.to(torch.promote_types(gradient.dtype, dtype)).mul_(scale)
    return gradient.to(dtype)


def _dtype_of(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _Backward(torch.autograd.Function):
    """Saves all that the backward needs; the result stands for `y`: its shape, but one element."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        U: Tensor | None,
        V: Tensor | None,
        C: Tensor,
        scale: float,
    ) -> Tensor:
        dtype = _dtype_of(x)
        wants_x, wants_C = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
        xV = None
        if wants_C:
            with torch.autocast(x.device.type, enabled=False):
                xV = x.to(dtype) if V is None else x.to(dtype).flatten(0, -2) @ whole(V, dtype)
        ctx.save_for_backward(xV, U if wants_C else None, W if wants_x else None)
        ctx.C_dtype, ctx.scale = C.dtype, scale
        ctx.bias_dtype = None if bias is None else bias.dtype
        shape = (*x.shape[:-1], W.shape[0])
        return x.new_empty_strided(shape, (0,) * len(shape), dtype=dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        xV, U, W = ctx.saved_tensors
        wants_x, _, wants_bias, _, _, wants_C, _ = ctx.needs_input_grad
        dbias = dC = None
        with torch.autocast(dy.device.type, enabled=False):
            flat = dy.flatten(0, -2)
            dx = dy @ W.to(dy.dtype) if wants_x else None
            if wants_bias:
                dbias = flat.sum(0).to(ctx.bias_dtype)
            if wants_C:
                dyU = flat if U is None else flat @ whole(U, dy.dtype)
                dC = scaled_(dyU.mT @ xV.flatten(0, -2), ctx.scale, ctx.C_dtype)
        return dx, None, dbias, None, None, dC, None


class _Forward(torch.autograd.Function):
    """`x Wᵀ + bias`, nothing saved; its gradient goes on to `_Backward`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, shape: Tensor) -> Tensor:
        dtype = shape.dtype
        with torch.autocast(x.device.type, enabled=False):
            return torch.nn.functional.linear(
                x.to(dtype), W.to(dtype), None if bias is None else bias.to(dtype)
            )

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("compact_linear")
        refuse_batched_gradient("compact_linear", dy)
        return None, None, None, dy
