"""AdamW fused with a projection: the last product of the projection, the step in its epilogue."""

from __future__ import annotations

import torch
from torch import Tensor

from sculpt_kernels.adamw.triton_kernels import direction_kernel, step_kernel
from sculpt_kernels.triton import launcher
from sculpt_kernels.triton.tiles import TileConfig

_DIRECTION_CONFIG = TileConfig(32, 128, 0, warps=4, stages=1)


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
) -> Tensor:
    """One AdamW step whose update, or gradient, is projected; `W` and the moments in place.

    Arguments and formulas are those of `sculpt_kernels.project_adamw_`: for the update an
    elementwise pass writes the direction `D` first, `W - lr P(D)` follows. 0-d tensors on the
    device of `W` are read in the kernel, so that a captured graph sees new values.

    Bytes per weight with 16-bit `G` and float32 state: 30 for `"gradient"` with a 16-bit copy
    (AdamW alone 28, unfused 34), 34 for `"update"`. FLOPs: those of the projection.
    """
    if W.numel() == 0:
        return W
    basis = U if V is None else V
    dtype = G.dtype if basis is None else basis.dtype
    device = W.device
    scalars = {
        "rest1": _rest(betas[0], device),
        "rest2": _rest(betas[1], device),
        "eps": launcher.number(eps, device),
        "weight_decay": launcher.number(weight_decay, device),
        "step": launcher.whole(step, device),
    }
    D = G
    if project == "update":
        D = torch.empty_like(G, dtype=dtype)
        _direction_(D, W, G, exp_avg, exp_avg_sq, scalars)
    A, B, A2, B2 = factors(D.to(dtype), U, V, form)
    segments = 0 if not A.shape[-1] else 1 if A2 is None else 2
    second = (A, B) if A2 is None or B2 is None else (A2, B2)
    config = launcher.choose("adamw both" if segments == 2 else "adamw", A.dtype, device)
    state = (D, exp_avg, exp_avg_sq, W if copy is None else copy)
    for first, (w, *others, a, b, a2, b2) in launcher.batches(W, *state, A, B, *second):
        g, m, s, k = others
        launcher.launch(
            step_kernel,
            launcher.tile_count(config, w),
            config,
            device,
            **launcher.operands(step_kernel, w=w, g=g, m=m, s=s, k=k, a=a, b=b, a2=a2, b2=b2),
            **scalars,
            lr=launcher.number(lr, device),
            seed=launcher.whole(0 if seed is None else seed, device),
            first_matrix=first,
            m=w.shape[1],
            n=w.shape[2],
            k=a.shape[2],
            k2=a2.shape[2],
            GRADIENT=project == "gradient",
            COPY=copy is not None,
            ALIKE=all(x.stride()[1:] == w.stride()[1:] for x in others),
            NEAR=launcher.near(config, w, *others),
            VECTOR=launcher.common_vector(w, *others),
            SEGMENTS=segments,
            STOCHASTIC=rounding == "stochastic",
            PRECISION=launcher.input_precision(A.dtype),
        )
    return W


def _rest(beta: float | Tensor, device: torch.device) -> float | Tensor:
    """`1 - beta`, taken in float64 before it is rounded; a tensor on the device as it is."""
    value = launcher.number(beta, device)
    return value if isinstance(value, Tensor) else 1.0 - value


def _direction_(
    D: Tensor,
    W: Tensor,
    G: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: dict[str, float | Tensor],
) -> None:
    """`D <- m̂ / (sqrt(v̂) + eps) + weight_decay W` from moments that take in `G` on the way."""
    for _, (d, w, g, m, s) in launcher.batches(D, W, G, exp_avg, exp_avg_sq):
        launcher.launch(
            direction_kernel,
            launcher.tile_count(_DIRECTION_CONFIG, w),
            _DIRECTION_CONFIG,
            W.device,
            **launcher.operands(direction_kernel, d=d, w=w, g=g, m=m, s=s),
            **scalars,
            m=w.shape[1],
            n=w.shape[2],
        )


def factors(
    G: Tensor, U: Tensor | None, V: Tensor | None, form: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`A, B, A2, B2` with `P(G) = G - A Bᵀ - A2 B2ᵀ`: plain matrix products, by the library.

    The long side of `G` is contracted first. `strict` reads `G` twice and needs no third product
    with it: `P(G) = G - U (UᵀG) - (GV - U UᵀGV) Vᵀ`.
    """
    if form == "left" or (form == "strict" and V is not None and not V.shape[-1]):
        assert U is not None
        return U, G.mT @ U, None, None
    if form == "right" or (form == "strict" and U is not None and not U.shape[-1]):
        assert V is not None
        return G @ V, V, None, None
    assert U is not None
    assert V is not None
    if form == "strict":
        right = G @ V
        return U, G.mT @ U, right - U @ (U.mT @ right), V
    if not (U.shape[-1] and V.shape[-1]):
        return U[..., :0], V[..., :0], None, None
    if G.shape[-2] <= G.shape[-1]:
        return U @ (U.mT @ (G @ V)), V, None, None
    return U, V @ (V.mT @ (G.mT @ U)), None, None
