"""From a target to the bases that its engine needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sculpt.config import SculptConfig
from sculpt.curvature.directions import Directions
from sculpt.task.targets import Target
from sculpt_kernels import Subspace, SubspaceCache, plan, split

Split = Callable[..., Subspace]


@dataclass(frozen=True)
class Bases:
    """Bases of one weight `(..., m, n)`, with orthonormal columns.

    Attributes:
        U, V: `(..., m, r)`, `(..., n, s)`. Compact: of what trains, `None` for the whole of the
            longer side. Other engines: what `project_` takes.
        removed: compact with full coordinates: preserved directions of the longer side.
        complement: other engines: `"both"` where the bases are those of what trains.
        energy: share of `‖W‖²_F` in the preserved directions, or of `tr S tr A` for curvature;
            method: how they were found.
        gain: by what coordinates move the weight further than orthonormal bases would, so that the
            outputs of the layer move as far as by dense steps.
    """

    U: Tensor | None
    V: Tensor | None
    removed: Tensor | None
    complement: str
    energy: float
    method: str
    gain: float = 1.0


def splitter(config: SculptConfig) -> Split:
    """`split`, through the cache where the configuration names one."""
    return split if config.subspace_cache is None else SubspaceCache(config.subspace_cache).split


def find_bases(
    target: Target,
    config: SculptConfig,
    split: Split,
    given: Subspace | None = None,
    stored: Tensor | None = None,
    directions: Directions | None = None,
) -> Bases:
    """The bases that the configured engine needs for `target`.

    Args:
        stored: the weight as its module stores it, where the module itself has only a part.
        directions: those that earlier tasks do not need, where the bases come from curvature.

    Raises:
        TypeError, ValueError: the weight is not finite, or `given` does not fit.
    """
    weight = target.oriented(target.parameter.detach() if stored is None else stored)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    basis = weight.dtype if config.basis_dtype == "weight" else dtype
    if directions is not None and directions.has(target.name):
        return _from_curvature(target, config, directions, basis)
    find = partial(_split_each, target, split, weight, basis)
    m, n = weight.shape[-2:]
    if config.chosen_engine == "compact":
        low = find("low") if given is None else _checked(target, config, given, weight, basis)
        bases = Bases(low.U, low.V, None, "none", low.energy, low.method)
        if config.coordinates == "thin" or m == n:
            return bases
        high = find("high")
        if m > n:
            return replace(bases, U=None, removed=high.U)
        return replace(bases, V=None, removed=high.V)
    if given is not None:
        raise ValueError(
            f"subspaces[{target.name!r}] is for engine='compact'; "
            f"engine={config.chosen_engine!r} finds its own"
        )
    complement = "none"
    if m == n:
        best = plan(
            (m, n), target.preserved, form=config.constraint, dtype=basis, device=weight.device
        )
        complement = "both" if best.complement == "both" else "none"
    found = find("low" if complement == "both" else "high")
    return Bases(found.U, found.V, None, complement, found.energy, found.method)


def _from_curvature(
    target: Target, config: SculptConfig, directions: Directions, dtype: torch.dtype
) -> Bases:
    """The same, in directions that earlier tasks do not need."""
    name, (m, n) = target.name, target.shape[-2:]
    if config.chosen_engine != "compact":
        high_U, high_V = directions.preserved(name, target.preserved)
        energy = 1 - directions.touched(name, high_U, high_V, outside=True)
        high_U, high_V = (basis.to(dtype).contiguous() for basis in (high_U, high_V))
        return Bases(high_U, high_V, None, "none", energy, "curvature, leading preserved")
    method = "curvature, ratio" if directions.compares(name) else "curvature, trailing"
    U, V = directions.trainable(name, target.trainable_rank)
    energy = 1 - directions.touched(name, U, V)
    low_U, low_V = (basis.to(dtype).contiguous() for basis in (U, V))
    if config.coordinates == "thin" or m == n:
        return Bases(low_U, low_V, None, "none", energy, method, directions.gain(name, U, V))
    preserved = directions.preserved(name, target.preserved)
    high_U, high_V = (basis.to(dtype).contiguous() for basis in preserved)
    if m > n:
        return Bases(None, low_V, high_U, "none", energy, method, directions.gain(name, U, V))
    return Bases(low_U, None, high_V, "none", energy, method)


def _split_each(
    target: Target, split: Split, weight: Tensor, dtype: torch.dtype, part: str
) -> Subspace:
    """Split in float64, so that the span is exact, and round the bases once; stacks one by one."""
    matrices = weight.unbind() if weight.ndim == 3 else (weight,)
    found: list[Subspace] = []
    for index, matrix in enumerate(matrices):
        name = target.name if weight.ndim == 2 else f"{target.name}[{index}]"
        if target.places[0].parameter == "weight":
            name = f"{name}.weight"
        try:
            one = split(matrix.double(), rank=target.preserved, part=part)
        except ValueError as error:
            raise ValueError(f"{name} cannot be split: {error}") from error
        found.append(replace(one, U=one.U.to(dtype), V=one.V.to(dtype)))
    if weight.ndim == 2:
        return found[0]
    return replace(
        found[0],
        U=torch.stack([one.U for one in found]),
        V=torch.stack([one.V for one in found]),
        energy=min(one.energy for one in found),
    )


def _checked(
    target: Target, config: SculptConfig, given: Subspace, weight: Tensor, dtype: torch.dtype
) -> Subspace:
    name = f"subspaces[{target.name!r}]"
    if config.coordinates == "full":
        raise ValueError(f"{name} is for coordinates='thin'; 'full' needs both parts")
    if given.part != "low":
        raise ValueError(f"{name} must have part 'low'; got {given.part!r}")
    for side, basis, size in zip("UV", (given.U, given.V), weight.shape[-2:], strict=True):
        expected = (*weight.shape[:-2], size, target.trainable_rank)
        if tuple(basis.shape) != expected or basis.dtype != dtype or basis.device != weight.device:
            raise ValueError(
                f"{name}.{side} must be {expected}, {dtype}, on {weight.device}; "
                f"got {tuple(basis.shape)}, {basis.dtype}, on {basis.device}"
            )
    return given
