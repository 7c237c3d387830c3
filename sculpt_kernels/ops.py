"""`torch.library` operators: what `torch.compile`, fake tensors and exporters see.

Each operator stands for one public function, takes its arguments flattened to a schema (a scalar
that may be a number or a 0-d tensor becomes two arguments) and runs that function, which checks the
arguments and chooses the implementation by device. Eager calls on plain tensors never come here:
see `sculpt_kernels.tracing`.
"""

# No postponed annotations: the schemas are read from them.
from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from sculpt_kernels.adamw.adamw import project_adamw_
from sculpt_kernels.coordinates.coordinates import compress, expand_add_
from sculpt_kernels.coordinates.expand_many import expand_add_many_
from sculpt_kernels.projection.project import project, project_, project_many_

Maybe = Optional[Tensor]  # noqa: UP045  (schema inference does not know `Tensor | None`)
MaybeInt = Optional[int]  # noqa: UP045
MaybeDtype = Optional[torch.dtype]  # noqa: UP045


@torch.library.custom_op("sculpt_kernels::project_", mutates_args={"G"})
def _project_(
    G: Tensor,
    U: Maybe,
    V: Maybe,
    form: str,
    backend: str,
    check: bool,
    complement: str,
    precision: str,
) -> None:
    project_(
        G, U, V, form=form, backend=backend, check=check, complement=complement, precision=precision
    )


@torch.library.custom_op("sculpt_kernels::project", mutates_args=())
def _project(
    G: Tensor,
    U: Maybe,
    V: Maybe,
    form: str,
    backend: str,
    check: bool,
    complement: str,
    precision: str,
    out_dtype: MaybeDtype,
) -> Tensor:
    return project(
        G,
        U,
        V,
        form=form,
        backend=backend,
        check=check,
        complement=complement,
        precision=precision,
        out_dtype=out_dtype,
    )


@torch.library.custom_op("sculpt_kernels::project_many_", mutates_args={"Gs"})
def _project_many_(
    Gs: Sequence[Tensor],
    Us: Sequence[Maybe],
    Vs: Sequence[Maybe],
    form: str,
    backend: str,
    check: bool,
    complement: str,
    precision: str,
) -> None:
    project_many_(
        Gs,
        Us,
        Vs,
        form=form,
        backend=backend,
        check=check,
        complement=complement,
        precision=precision,
    )


@torch.library.custom_op("sculpt_kernels::compress", mutates_args=())
def _compress(G: Tensor, U: Tensor, V: Tensor, out_dtype: torch.dtype, backend: str) -> Tensor:
    return compress(G, U, V, out_dtype=out_dtype, backend=backend)


@torch.library.custom_op("sculpt_kernels::expand_add_", mutates_args={"W"})
def _expand_add_(
    W: Tensor,
    C: Tensor,
    U: Maybe,
    V: Maybe,
    alpha: float,
    alpha_tensor: Maybe,
    rounding: str,
    seed: MaybeInt,
    seed_tensor: Maybe,
    base: Maybe,
    backend: str,
) -> None:
    expand_add_(
        W,
        C,
        U,
        V,
        alpha=_either(alpha, alpha_tensor),
        rounding=rounding,
        seed=seed if seed_tensor is None else seed_tensor,
        base=base,
        backend=backend,
    )


@torch.library.custom_op("sculpt_kernels::expand_add_many_", mutates_args={"Ws"})
def _expand_add_many_(
    Ws: Sequence[Tensor],
    Cs: Sequence[Tensor],
    Us: Sequence[Maybe],
    Vs: Sequence[Maybe],
    alpha: float,
    alpha_tensor: Maybe,
    rounding: str,
    seeds: Maybe,
    bases: Sequence[Tensor],
    backend: str,
) -> None:
    expand_add_many_(
        Ws,
        Cs,
        Us,
        Vs,
        alpha=_either(alpha, alpha_tensor),
        rounding=rounding,
        seeds=seeds,
        bases=bases or None,
        backend=backend,
    )


@torch.library.custom_op(
    "sculpt_kernels::project_adamw_", mutates_args={"W", "exp_avg", "exp_avg_sq", "copy"}
)
def _project_adamw_(
    W: Tensor,
    G: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    U: Maybe,
    V: Maybe,
    form: str,
    project: str,
    lr: float,
    lr_tensor: Maybe,
    beta1: float,
    beta1_tensor: Maybe,
    beta2: float,
    beta2_tensor: Maybe,
    eps: float,
    eps_tensor: Maybe,
    weight_decay: float,
    weight_decay_tensor: Maybe,
    step: MaybeInt,
    step_tensor: Maybe,
    complement: str,
    copy: Maybe,
    rounding: str,
    seed: MaybeInt,
    seed_tensor: Maybe,
    backend: str,
    check: bool,
) -> None:
    number = step if step_tensor is None else step_tensor
    assert number is not None
    project_adamw_(
        W,
        G,
        exp_avg,
        exp_avg_sq,
        U,
        V,
        form=form,
        project=project,
        lr=_either(lr, lr_tensor),
        betas=(_either(beta1, beta1_tensor), _either(beta2, beta2_tensor)),
        eps=_either(eps, eps_tensor),
        weight_decay=_either(weight_decay, weight_decay_tensor),
        step=number,
        complement=complement,
        copy=copy,
        rounding=rounding,
        seed=seed if seed_tensor is None else seed_tensor,
        backend=backend,
        check=check,
    )


def _either(number: float, tensor: Maybe) -> float | Tensor:
    return number if tensor is None else tensor


def _nothing(*args: object, **kwargs: object) -> None:
    """An operator that only writes to its arguments has no output to describe."""


for _op in (_project_, _project_many_, _expand_add_, _expand_add_many_, _project_adamw_):
    _op.register_fake(_nothing)


@_project.register_fake
def _(
    G: Tensor,
    U: Maybe,
    V: Maybe,
    form: str,
    backend: str,
    check: bool,
    complement: str,
    precision: str,
    out_dtype: MaybeDtype,
) -> Tensor:
    return torch.empty_like(G, dtype=out_dtype)


@_compress.register_fake
def _(G: Tensor, U: Tensor, V: Tensor, out_dtype: torch.dtype, backend: str) -> Tensor:
    return G.new_empty(*G.shape[:-2], U.shape[-1], V.shape[-1], dtype=out_dtype)
