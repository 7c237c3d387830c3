"""One AdamW step whose gradient or whose applied update is projected."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from sculpt_kernels import checks
from sculpt_kernels.dispatch import choose, unsupported
from sculpt_kernels.operation import is_traced, number_and_tensor, operation
from sculpt_kernels.products import matrices, panels_of
from sculpt_kernels.projection import library, row_panels
from sculpt_kernels.rounding import store

Scalar = float | Tensor


@dataclass(frozen=True)
class Step:
    """The scalars of one step, numbers or 0-d tensors alike."""

    lr: Scalar
    beta1: Scalar
    beta2: Scalar
    eps: Scalar
    weight_decay: Scalar
    step: int | Tensor

    @property
    def correction1(self) -> Scalar:
        return 1 - self.beta1**self.step

    @property
    def correction2(self) -> Scalar:
        return 1 - self.beta2**self.step


@operation()
def project_adamw_(
    W: Tensor,
    G: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    U: Tensor | None = None,
    V: Tensor | None = None,
    *,
    form: str = "core",
    project: str = "update",
    lr: float | Tensor,
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
    eps: float | Tensor = 1e-8,
    weight_decay: float | Tensor = 0.0,
    step: int | Tensor,
    complement: str = "none",
    copy: Tensor | None = None,
    rounding: str = "nearest",
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One projected AdamW step in place; returns `W`.

    With `P` the projection of `project_` and `g` the gradient,

        exp_avg    <- beta1 exp_avg    + (1 - beta1) g
        exp_avg_sq <- beta2 exp_avg_sq + (1 - beta2) g²
        D           = (exp_avg / (1 - beta1^step)) / (√(exp_avg_sq / (1 - beta2^step)) + eps)

    - `project="update"`: `g = G` and `W <- W - lr P(D + weight_decay W)`. What is applied, weight
      decay included, lies in the allowed subspace exactly.
    - `project="gradient"`: `g = P(G)` and `W <- W - lr (D + weight_decay W)`, the decoupled decay
      of AdamW (arXiv 1711.05101). The division by `√exp_avg_sq` turns the update out of the
      allowed subspace again, by 10 to 40 % of its norm for ranks of `k/2`.

    Args:
        W, G, exp_avg, exp_avg_sq: `(..., m, n)`, each of any floating dtype, any strides; all but
            `G` are written.
        U: `(..., m, r)`; V: `(..., n, s)`; one dtype, any floating one; `None` where the form has
            no such side.
        form, complement, backend: as for `project_`.
        lr, betas, eps, weight_decay: numbers or 0-d tensors on the device of `W`.
        step: number of this step, from 1; an int or a 0-d tensor.
        copy: `(..., m, n)`: receives the new `W` in its own dtype, for example bfloat16.
        rounding: `"nearest"`, or `"stochastic"` for the bfloat16 or float16 `copy` or, without
            one, `W`.
        seed: 64-bit int or 0-d int64 tensor; required by and only for `"stochastic"`.

    Raises:
        TypeError, ValueError: an argument does not fit; raised before anything is changed.
        RuntimeError: the backend cannot run here.
    """
    if is_traced(W) or is_traced(G):
        torch.ops.sculpt_kernels.project_adamw_(
            W, G, exp_avg, exp_avg_sq, U, V, form, project,
            *number_and_tensor(lr), *number_and_tensor(betas[0]), *number_and_tensor(betas[1]),
            *number_and_tensor(eps), *number_and_tensor(weight_decay), *number_and_tensor(step),
            complement, copy, rounding, *number_and_tensor(seed), backend,
        )  # fmt: skip
        return W
    checks.one_of("project", project, ("update", "gradient"))
    checks.projection(W, U, V, form, name="W", complement=complement, mixed=True)
    state = {"W": W, "G": G, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    if copy is not None:
        state["copy"] = copy
    _check_state(state, U, V)
    _check_scalars(W, lr, betas, eps, weight_decay, step)
    target = "W" if copy is None else "copy"
    checks.rounding(rounding, seed, target, state[target])
    scalars = Step(lr, betas[0], betas[1], eps, weight_decay, step)

    def refused() -> str | None:
        if complement != "none":
            return f"the Triton kernels take no complement={complement!r}"
        return unsupported(*state.values(), U, V)

    chosen = choose(backend, W.device, refused, rounding)
    if W.numel() == 0 or W.is_meta:
        return W
    with torch.no_grad():
        if chosen == "triton":
            from sculpt_kernels.adamw import triton

            return triton.project_adamw_(
                W, G, exp_avg, exp_avg_sq, U, V, form=form, project=project, lr=lr,
                betas=betas, eps=eps, weight_decay=weight_decay, step=step, copy=copy,
                rounding=rounding, seed=seed,
            )  # fmt: skip
        key = seed if rounding == "stochastic" else None
        everything = matrices(W, G, exp_avg, exp_avg_sq, copy, U, V)
        for index, (w, g, m, v, c, a, b) in enumerate(everything):
            state_of = _State(w, g, m, v, c, scalars, key, index * w.shape[0], chosen)
            if w.is_cpu:
                source = (_Update if project == "update" else _Gradient)(state_of)
                row_panels.project_source(source, a, b, form, complement, state_of.wide)
            else:
                _on_device(state_of, a, b, form, complement, project)
    return W


def _on_device(
    state: _State, U: Tensor | None, V: Tensor | None, form: str, complement: str, project: str
) -> None:
    """Whole matrices: on an accelerator a panel at a time would be a launch at a time."""
    every = slice(None)
    basis = V if U is None else U
    assert basis is not None
    if project == "update":
        state.moments(every, state.G.to(state.wide))
        direction = state.direction(every).to(basis.dtype)
        library.project_batch(direction, U, V, form, complement)
        state.apply(every, direction.to(state.wide))
    else:
        gradient = state.G.to(basis.dtype, copy=True)
        library.project_batch(gradient, U, V, form, complement)
        state.moments(every, gradient.to(state.wide))
        state.apply(every, state.direction(every))


@dataclass
class _State:
    """One matrix with its moments, and the elementwise part of the step on a range of its rows."""

    W: Tensor
    G: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    copy: Tensor | None
    scalars: Step
    seed: int | Tensor | None
    row0: int
    backend: str = "torch"

    @property
    def wide(self) -> torch.dtype:
        dtype = torch.promote_types(self.W.dtype, self.exp_avg.dtype)
        return torch.promote_types(dtype, torch.float32)

    @cached_property
    def is_plain(self) -> bool:
        """Whether the library's fused AdamW takes row panels of these tensors."""
        scalars = vars(self.scalars).values()
        return (
            all(X.dtype == torch.float32 and X.is_contiguous() for X in self.written)
            and not any(isinstance(value, Tensor) for value in scalars)
            and self.seed is None
        )

    @property
    def written(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.W, self.exp_avg, self.exp_avg_sq

    def fused(
        self, rows: slice, weights: Tensor, gradient: Tensor, lr: float, decay: float
    ) -> None:
        """One pass of the library over `weights` and the moments of these rows."""
        s = self.scalars
        adamw(
            [weights], [gradient], [self.exp_avg[rows]], [self.exp_avg_sq[rows]], [],
            [torch.tensor(float(s.step) - 1)], fused=True, amsgrad=False, maximize=False,
            beta1=s.beta1, beta2=s.beta2, eps=float(s.eps), lr=lr, weight_decay=decay,
        )  # fmt: skip

    def moments(self, rows: slice, gradient: Tensor) -> None:
        """Take a gradient in the dtype of the computation into the moments."""
        s = self.scalars
        for stored, value, beta in (
            (self.exp_avg[rows], gradient, s.beta1),
            (self.exp_avg_sq[rows], gradient.square(), s.beta2),
        ):
            if stored.dtype == value.dtype and not isinstance(beta, Tensor):
                stored.lerp_(value, 1 - beta)
            else:
                stored.copy_(stored.to(value.dtype) * beta + value * (1 - beta))

    def direction(self, rows: slice) -> Tensor:
        """`m̂ / (√v̂ + eps) + weight_decay W` from the moments as they are stored."""
        s = self.scalars
        root = self.exp_avg_sq[rows].to(self.wide, copy=True).sqrt_()
        root.mul_(1 / s.correction2**0.5).add_(s.eps)
        step = (self.exp_avg[rows].to(self.wide) / root).mul_(1 / s.correction1)
        if isinstance(s.weight_decay, Tensor) or s.weight_decay:
            step.add_(self.W[rows].to(self.wide) * s.weight_decay)
        return step

    def apply(self, rows: slice, step: Tensor) -> None:
        """`W <- W - lr step`, rounded once."""
        if self.is_plain:
            self.W[rows].sub_(step, alpha=float(self.scalars.lr))
            if self.copy is not None:
                self.copy[rows] = self.W[rows]
            return
        new = torch.sub(self.W[rows].to(self.wide), step.mul_(self.scalars.lr))
        for out in (self.W, self.copy):
            if out is None:
                continue
            rounds = out is self.copy or self.copy is None
            row0 = self.row0 + (rows.start or 0)
            store(out[rows], new, self.seed if rounds else None, row0, self.backend)

    def panels(self) -> Iterator[slice]:
        return panels_of(self.W.shape[0], self.W.shape[1])


class _Update:
    """The step `D` as a matrix: it exists one panel at a time and goes into `W` projected."""

    def __init__(self, state: _State) -> None:
        self.state = state
        self.shape = (state.W.shape[0], state.W.shape[1])
        self.panels = state.panels

    def load(self, rows: slice) -> Tensor:
        state = self.state
        gradient = state.G[rows].to(state.wide)
        if not state.is_plain:
            state.moments(rows, gradient)
            return state.direction(rows)
        # A step of length -1 from zero, without decay, is the direction itself.
        step = torch.zeros_like(gradient, memory_format=torch.contiguous_format)
        state.fused(rows, step, gradient.contiguous(), -1.0, 0.0)
        decay = float(state.scalars.weight_decay)
        return step.add_(state.W[rows], alpha=decay) if decay else step

    def reload(self, rows: slice) -> Tensor:
        return self.state.direction(rows)

    def store(self, rows: slice, panel: Tensor) -> None:
        self.state.apply(rows, panel)


class _Gradient:
    """The gradient as a matrix; its projection goes into the moments, and these into `W`."""

    def __init__(self, state: _State) -> None:
        self.state = state
        self.shape = (state.W.shape[0], state.W.shape[1])
        self.panels = state.panels

    def load(self, rows: slice) -> Tensor:
        return self.state.G[rows].to(self.state.wide, copy=True)

    reload = load

    def store(self, rows: slice, panel: Tensor) -> None:
        state, s = self.state, self.state.scalars
        if not state.is_plain:
            state.moments(rows, panel)
            state.apply(rows, state.direction(rows))
            return
        state.fused(rows, state.W[rows], panel.contiguous(), float(s.lr), float(s.weight_decay))
        if state.copy is not None:
            state.copy[rows] = state.W[rows]


def _check_state(state: dict[str, Tensor], U: Tensor | None, V: Tensor | None) -> None:
    W = state["W"]
    for name, X in state.items():
        checks.matrix(name, X)
        if X.shape != W.shape:
            raise ValueError(
                f"{name} must have the shape {tuple(W.shape)} of W; got {checks.describe(X)}"
            )
    checks.no_wrapper(**state)
    checks.same_device(**state, U=U, V=V)
    written = [name for name in state if name != "G"]
    for name in written:
        checks.writable(name, state[name])
        others = {other: X for other, X in state.items() if other != name}
        checks.no_overlap(name, state[name], **others, U=U, V=V)


def _check_scalars(W: Tensor, lr: Any, betas: Any, eps: Any, weight_decay: Any, step: Any) -> None:
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"betas must be two numbers; got {checks.describe(betas)}")
    for name, value, upper in (
        ("lr", lr, None),
        ("betas[0]", betas[0], 1.0),
        ("betas[1]", betas[1], 1.0),
        ("eps", eps, None),
        ("weight_decay", weight_decay, None),
    ):
        checks.scalar(name, value, W, lower=0.0, upper=upper)
    checks.scalar("step", step, W, lower=1, integer=True)
