"""The specification: every operation of the package as a few lines of torch.

Nothing here is fast. Each function says in code what the formula says on paper, works on any
floating dtype and any leading batch dimensions, and changes none of its arguments. Every fast path
is tested against these in float64 from the same rounded inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sculpt_kernels.operation import operation


@operation(transforms=True)
def project(
    G: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    form: str = "core",
    complement: str = "none",
) -> Tensor:
    """`G - U(UᵀGV)Vᵀ`, `(I-UUᵀ)G(I-VVᵀ)`, `(I-UUᵀ)G` or `G(I-VVᵀ)`.

    For sides named in `complement`, `I - UUᵀ` takes the place of `UUᵀ`.
    """

    def left(X: Tensor) -> Tensor:
        assert U is not None
        part = U @ (U.mT @ X)
        return X - part if complement in ("left", "both") else part

    def right(X: Tensor) -> Tensor:
        assert V is not None
        part = (X @ V) @ V.mT
        return X - part if complement in ("right", "both") else part

    if form == "core":
        return G - right(left(G))
    if form in ("strict", "left"):
        G = G - left(G)
    if form in ("strict", "right"):
        G = G - right(G)
    return G


_project = project  # where an argument is called `project` too


@operation(transforms=True)
def compress(G: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """`UᵀGV`."""
    return U.mT @ G @ V


@operation(transforms=True)
def expand_add(W: Tensor, C: Tensor, U: Tensor, V: Tensor, alpha: float = 1.0) -> Tensor:
    """`W + alpha U C Vᵀ`."""
    return W + alpha * (U @ C @ V.mT)


@operation(transforms=True)
def adamw_direction(
    G: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`m̂ / (√v̂ + eps)` and the new moments of AdamW (Loshchilov & Hutter, arXiv 1711.05101)."""
    m = betas[0] * exp_avg + (1 - betas[0]) * G
    v = betas[1] * exp_avg_sq + (1 - betas[1]) * G**2
    m_hat = m / (1 - betas[0] ** step)
    v_hat = v / (1 - betas[1] ** step)
    return m_hat / (v_hat.sqrt() + eps), m, v


@operation(transforms=True)
def project_adamw(
    W: Tensor,
    G: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    *,
    form: str = "core",
    project: str = "update",
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: int,
    complement: str = "none",
) -> tuple[Tensor, Tensor, Tensor]:
    """The new `W`, `exp_avg`, `exp_avg_sq` of one projected AdamW step.

    `"update"`: `W - lr P(m̂ / (√v̂ + eps) + weight_decay W)`: all that is applied is projected.
    `"gradient"`: AdamW with decoupled decay on `P(G)`.
    """
    if project == "gradient":
        G = _project(G, U, V, form, complement)
    step_size, m, v = adamw_direction(G, exp_avg, exp_avg_sq, betas=betas, eps=eps, step=step)
    step_size = step_size + weight_decay * W
    if project == "update":
        step_size = _project(step_size, U, V, form, complement)
    return W - lr * step_size, m, v


@operation(transforms=True)
def linear_gradients(
    x: Tensor, W: Tensor, dy: Tensor, U: Tensor, V: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """`dx, dbias, dC` of `y = x (W + scale U C Vᵀ)ᵀ + bias` for `x` `(T, n)`, `dy` `(T, m)`."""
    dW = dy.mT @ x
    return dy @ W, dy.sum(0), scale * (U.mT @ dW @ V)


@operation(transforms=True)
def embedding_gradient(
    ids: Tensor, dy: Tensor, W: Tensor, U: Tensor, V: Tensor, scale: float = 1.0
) -> Tensor:
    """`dC` of `y = (W + scale U C Vᵀ)[ids]` for `ids` `(T,)` and `dy` `(T, n)`."""
    dW = torch.zeros_like(W).index_add(0, ids, dy)
    return scale * (U.mT @ dW @ V)


@operation(transforms=True)
def split(W: Tensor, rank: int, part: str) -> tuple[Tensor, Tensor]:
    """Leading (`high`) or trailing (`low`) singular vectors of `W`, as columns."""
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    columns = slice(None, rank) if part == "high" else slice(rank, None)
    return U[..., columns], Vh.mT[..., columns]


@operation(transforms=True)
def leak(delta: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`‖UᵀΔV‖/‖Δ‖`, `‖UᵀΔ‖/‖Δ‖`, `‖ΔV‖/‖Δ‖` in float64, one triple per matrix."""
    D, U, V = delta.double(), U.double(), V.double()
    norm = torch.linalg.matrix_norm(D)
    parts = (U.mT @ D @ V, U.mT @ D, D @ V)
    core, left, right = (torch.linalg.matrix_norm(part) / norm for part in parts)
    return core, left, right
