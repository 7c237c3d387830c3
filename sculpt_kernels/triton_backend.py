"""Where the public functions meet the Triton launchers; imports Triton only when it is used."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def project_reason(
    G: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    form: str,
    complement: str,
    precision: str,
    backend: str,
) -> str | None:
    """Why the projection kernels cannot take this call, or `None`."""
    return "this version has no Triton kernel for projections"


def project_(G: Tensor, U: Tensor | None, V: Tensor | None, form: str) -> None:
    raise NotImplementedError


def project_groups_(
    Gs: Sequence[Tensor],
    Us: Sequence[Tensor | None],
    Vs: Sequence[Tensor | None],
    form: str,
    backend: str,
) -> Sequence[int]:
    """Project what the grouped kernel takes; return the indices of the rest."""
    return range(len(Gs))
