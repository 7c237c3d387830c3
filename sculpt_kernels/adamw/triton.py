"""AdamW fused with a projection: the last product of the projection, the step in its epilogue."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from sculpt_kernels.adamw.triton_step import direction_kernel, step_kernel
from sculpt_kernels.triton import launcher
from sculpt_kernels.triton.tiles import TileConfig
from sculpt_kernels.triton.update import factors, strides

_DIRECTION_CONFIG = TileConfig(32, 128, 0, warps=4, stages=1)


def supports(
    W: Tensor,
    G: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    copy: Tensor | None = None,
) -> str | None:
    """`None` if `project_adamw_` can run on these, else the reason."""
    return launcher.unsupported(W, G, exp_avg, exp_avg_sq, U, V, copy)


def project_adamw_(
    W: Tensor,
    G: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    *,
    form: str,
    project: str,
    lr: float | Tensor,
    betas: tuple[float | Tensor, float | Tensor],
    eps: float | Tensor,
    weight_decay: float | Tensor,
    step: int | Tensor,
    copy: Tensor | None = None,
    rounding: str = "nearest",
    seed: int | Tensor | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """One AdamW step whose update, or gradient, is projected; `W` and the moments in place.

    `project="update"`: moments of `G`, `D = m̂ / (sqrt(v̂) + eps) + weight_decay W` in an
    elementwise pass, then `W <- W - lr P(D)`: what is applied lies in the allowed subspace.
    `project="gradient"`: moments of `P(G)`, `W <- (1 - lr weight_decay) W - lr m̂ / (sqrt(v̂) +
    eps)`. `G` is not changed.

    Args:
        W, G, exp_avg, exp_avg_sq: `(..., m, n)`, each float32, bfloat16 or float16, any strides.
        U: `(..., m, r)`; V: `(..., n, s)`, of one dtype; `None` where the form has no such side;
            two-dimensional to share over the batch. The products run in this dtype.
        lr, betas, eps, weight_decay, step: numbers, or 0-d tensors on the device of `W`, which
            are read in the kernel, so that a captured graph sees new values; `step` counts from 1.
        copy: `(..., m, n)`: receives the new `W` in its own dtype, in the same pass.
        rounding, seed: as in `expand_add_`, for 16-bit `copy` or, without one, 16-bit `W`.
        config: tile configuration, instead of the table's.

    Bytes per weight with 16-bit `G` and float32 state: 30 for `"gradient"` with a 16-bit copy
    (AdamW alone 28, unfused 34), 34 for `"update"`. FLOPs: those of the projection.
    """
    if W.numel() == 0:
        return W
    basis = U if V is None else V
    dtype = G.dtype if basis is None else basis.dtype
    scalars = {
        "rest1": _rest(betas[0], W.device),
        "rest2": _rest(betas[1], W.device),
        "eps": launcher.number(eps, W.device),
        "weight_decay": launcher.number(weight_decay, W.device),
        "step": launcher.whole(step, W.device),
    }
    source = G
    if project == "update":
        source = torch.empty_like(G, dtype=dtype)
        direction_(source, W, G, exp_avg, exp_avg_sq, scalars)
    A, B, A2, B2 = factors(source.to(dtype), U, V, form)
    return step_(
        W, source, exp_avg, exp_avg_sq, A, B, A2, B2, gradient=project == "gradient", lr=lr,
        scalars=scalars, copy=copy, rounding=rounding, seed=seed, config=config,
    )  # fmt: skip


def step_(
    W: Tensor,
    D: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    A: Tensor,
    B: Tensor,
    A2: Tensor | None = None,
    B2: Tensor | None = None,
    *,
    gradient: bool,
    lr: float | Tensor,
    scalars: dict[str, float | Tensor],
    copy: Tensor | None = None,
    rounding: str = "nearest",
    seed: int | Tensor | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """The last pass of `project_adamw_`, once the factors of `P(D) = D - A Bᵀ - A2 B2ᵀ` are known.

    `D` is the gradient with `gradient`, else the direction that `direction_` wrote.
    """
    dtype = A.dtype
    segments = 2 if A2 is not None else 1 if A.shape[-1] else 0
    if segments < 2:
        A2, B2 = A, B
    config = launcher.choose("adamw both" if segments == 2 else "adamw", dtype, W.device, config)
    views = launcher.batches(W, D, exp_avg, exp_avg_sq, W if copy is None else copy, A, B, A2, B2)
    for first, (w, g, f, s, c, a, b, a2, b2) in views:
        count, m, n = w.shape
        launcher.launch(
            step_kernel,
            count * triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),
            config,
            W.device,
            W=w,
            G=g,
            M=f,
            S=s,
            K=c,
            A=a,
            B=b,
            A2=a2,
            B2=b2,
            lr=launcher.number(lr, W.device),
            seed=launcher.whole(0 if seed is None else seed, W.device),
            first_matrix=first,
            m=m,
            n=n,
            k=a.shape[2],
            k2=a2.shape[2],
            **scalars,
            **strides("w", "lmn", w),
            **strides("g", "lmn", g),
            **strides("m", "lmn", f),
            **strides("s", "lmn", s),
            **strides("k", "lmn", c),
            **strides("a", "lmk", a),
            **strides("b", "lnk", b),
            **strides("a2", "lmk", a2),
            **strides("b2", "lnk", b2),
            GRADIENT=gradient,
            COPY=copy is not None,
            ALIKE=all(x.stride()[1:] == w.stride()[1:] for x in (g, f, s, c)),
            NEAR=launcher.near(config, w, g, f, s, c),
            VECTOR=launcher.common_vector(w, g, f, s, c),
            SEGMENTS=segments,
            STOCHASTIC=rounding == "stochastic",
            PRECISION=launcher.input_precision(dtype),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            SUBTILES=config.subtiles,
        )
    return W


def _rest(beta: float | Tensor, device: torch.device) -> float | Tensor:
    """`1 - beta`, taken in float64 before it is rounded; a tensor on the device as it is."""
    value = launcher.number(beta, device)
    return value if isinstance(value, Tensor) else 1.0 - value


def direction_(
    D: Tensor,
    W: Tensor,
    G: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: dict[str, float | Tensor],
) -> None:
    """`D <- m̂ / (sqrt(v̂) + eps) + weight_decay W` from moments that take in `G` on the way."""
    config = _DIRECTION_CONFIG
    for _, (d, w, g, f, s) in launcher.batches(D, W, G, exp_avg, exp_avg_sq):
        count, m, n = w.shape
        launcher.launch(
            direction_kernel,
            count * triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),
            config,
            W.device,
            D=d,
            W=w,
            G=g,
            M=f,
            S=s,
            m=m,
            n=n,
            **scalars,
            **strides("d", "lmn", d),
            **strides("w", "lmn", w),
            **strides("g", "lmn", g),
            **strides("m", "lmn", f),
            **strides("s", "lmn", s),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
        )
