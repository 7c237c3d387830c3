"""Where the public functions meet the Triton launchers; Triton is imported only when it is used.

The `*_reason` functions say why a kernel cannot take a call, or `None`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sculpt_kernels import dispatch as backends
from sculpt_kernels.plan.projections import SMALL_RANK

# The kernels' word for what the public functions call "standard".
_PRECISION = {"standard": "fast", "exact": "exact"}


def project_reason(
    G: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    complement: str,
    precision: str,
    backend: str,
) -> str | None:
    if complement != "none":
        return f"the Triton kernels take no complement={complement!r}; the library's products do"
    from sculpt_kernels.projection import triton as project
    from sculpt_kernels.triton import update

    if _small(U, V):
        return project.supports(G, U, V, precision=_PRECISION[precision])
    if backend == "auto":
        return "large products belong to the library"
    if precision != "standard":
        return f"precision={precision!r} is for ranks up to {SMALL_RANK}"
    basis = V if U is None else U
    assert basis is not None
    return update.supports(G, basis, basis)


def project_(G: Tensor, U: Tensor | None, V: Tensor | None, form: str, precision: str) -> None:
    from sculpt_kernels.projection import triton as project
    from sculpt_kernels.triton import update

    if _small(U, V):
        project.project_(G, U, V, form, precision=_PRECISION[precision])
    else:
        update.project_large_(G, U, V, form)


def project_many_(
    Gs: Sequence[Tensor],
    Us: Sequence[Tensor | None],
    Vs: Sequence[Tensor | None],
    form: str,
    precision: str,
    backend: str,
) -> list[int]:
    """Project the matrices that the grouped kernel takes; return the indices of the rest."""
    groups: dict[Any, list[int]] = {}
    rest = []
    for i, (G, U, V) in enumerate(zip(Gs, Us, Vs, strict=True)):
        usable = backend in ("auto", "triton") and G.ndim == 2 and G.numel() and _small(U, V)
        if usable and _runs(G, U, V, precision, backend):
            ranks = tuple(None if B is None else B.shape for B in (U, V))
            groups.setdefault((G.shape, ranks, G.dtype, G.device), []).append(i)
        else:
            rest.append(i)
    if groups:
        from sculpt_kernels.projection import triton as project
    for group in groups.values():
        project.project_many_(
            [Gs[i] for i in group], [Us[i] for i in group], [Vs[i] for i in group],
            form, precision=_PRECISION[precision],
        )  # fmt: skip
    return rest


def _runs(G: Tensor, U: Tensor | None, V: Tensor | None, precision: str, backend: str) -> bool:
    def reason() -> str | None:
        return project_reason(G, U, V, "none", precision, backend)

    return backends.choose(backend, G.device, reason) == "triton"


def _small(U: Tensor | None, V: Tensor | None) -> bool:
    return all(B is None or B.shape[-1] <= SMALL_RANK for B in (U, V))


def compress_reason(G: Tensor, U: Tensor, V: Tensor) -> str | None:
    from sculpt_kernels.coordinates import triton_compress as compress

    return compress.supports(G, U, V)


def compress(G: Tensor, U: Tensor, V: Tensor, out: Tensor) -> None:
    from sculpt_kernels.coordinates import triton_compress as kernels

    kernels.compress(G, U, V, out)


def expand_add_reason(
    W: Tensor, C: Tensor, U: Tensor | None, V: Tensor | None, base: Tensor | None
) -> str | None:
    from sculpt_kernels.coordinates import triton_expand as expand_add

    return expand_add.supports(W, C, U, V, base)


def expand_add_(
    W: Tensor,
    C: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    alpha: float | Tensor,
    rounding: str,
    seed: int | Tensor | None,
    base: Tensor | None,
) -> None:
    from sculpt_kernels.coordinates import triton_expand as expand_add

    expand_add.expand_add_(W, C, U, V, alpha, rounding, seed, base)


def expand_add_many_(
    Ws: Sequence[Tensor],
    Cs: Sequence[Tensor],
    Us: Sequence[Tensor | None],
    Vs: Sequence[Tensor | None],
    alpha: float | Tensor,
    rounding: str,
    seeds: Tensor | None,
    bases: Sequence[Tensor] | None,
) -> None:
    from sculpt_kernels.coordinates import triton_expand as expand_add

    expand_add.expand_add_many_(Ws, Cs, Us, Vs, alpha, rounding, seeds, bases)


def adamw_reason(*tensors: Any, complement: str) -> str | None:
    if complement != "none":
        return f"the Triton kernels take no complement={complement!r}"
    from sculpt_kernels.adamw import triton as adamw

    return adamw.supports(*tensors)


def project_adamw_(*tensors: Any, **options: Any) -> None:
    from sculpt_kernels.adamw import triton as adamw

    adamw.project_adamw_(*tensors, **options)


def sketch(out: Tensor, seed: int, row0: int) -> Tensor:
    from sculpt_kernels.subspaces import triton_sketch as kernels

    return kernels.sketch(out, seed, row0)


__all__ = [
    "adamw_reason",
    "compress",
    "compress_reason",
    "expand_add_",
    "expand_add_many_",
    "expand_add_reason",
    "project_",
    "project_adamw_",
    "project_many_",
    "project_reason",
    "sketch",
]
