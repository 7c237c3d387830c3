"""Singular values of stored weights: one matrix in memory at a time, straight from safetensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sculpt.adaptive.importance import squared_values
from sculpt.storage.weights import INDEX, SINGLE, StoredWeights, StoredWeightsError

BARS = "▁▂▃▄▅▆▇█"
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Spectrum:
    """Singular values `σ₁ ≥ ... ≥ σ_k` of one weight, in short; of a stack, means over it.

    Attributes:
        largest, at_cut, smallest: `σ₁`, `σ_h`, `σ_k`.
        energy: share of `‖W‖²_F` in the preserved directions.
        stable_rank: `‖W‖²_F / σ₁²`.
        curve: `σ / σ₁` at evenly spaced ranks, from the first to the last.
    """

    largest: float
    at_cut: float
    smallest: float
    energy: float
    stable_rank: float
    curve: tuple[float, ...]

    def bars(self) -> str:
        return "".join(BARS[min(7, int(8 * value))] for value in self.curve)


def summarise(W: Tensor, preserved: int, points: int = 8) -> Spectrum:
    """Spectrum of `W` `(..., m, n)`, from the eigenvalues of its smaller Gram matrix in float64.

    points: how many values the curve has at the most.
    """
    squares = squared_values(W)
    values = squares.sqrt().reshape(-1, squares.shape[-1]).mean(0)
    total = squares.sum(-1)
    safe = torch.where(total > 0, total, 1)
    energy = torch.where(total > 0, squares[..., :preserved].sum(-1) / safe, 1.0).mean()
    first = torch.where(squares[..., 0] > 0, squares[..., 0], 1)
    at = torch.linspace(0, len(values) - 1, min(points, len(values))).round().long()
    return Spectrum(
        largest=float(values[0]),
        at_cut=float(values[preserved - 1]),
        smallest=float(values[-1]),
        energy=float(energy),
        stable_rank=float((total / first).mean()),
        curve=tuple((values[at] / values[0].clamp_min(1e-300)).tolist()),
    )


def find_weights(directory: Path | None) -> StoredWeights | str:
    """The weights of a model directory, or why there are none.

    Raises:
        ValueError: there are some, but they cannot be read.
    """
    if directory is None:
        return "there is only a configuration"
    try:
        return StoredWeights(directory)
    except StoredWeightsError as error:
        if any((directory / name).is_file() for name in (INDEX, SINGLE)):
            raise
        return str(error)


def stored_values(
    weights: StoredWeights, wanted: Mapping[str, tuple[int, ...]], prefix: str = ""
) -> Iterator[tuple[str, Tensor]]:
    """Yield each wanted parameter with its stored value, reading no other.

    Args:
        wanted: parameter names with their shapes.
        prefix: of the model inside the saved one (`base_model_prefix`), which names may lack.

    Raises:
        ValueError: a parameter is missing, or has another shape or no floating dtype.
    """
    for name, shape in wanted.items():
        candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        key = next((candidate for candidate in candidates if candidate in weights.tensors), None)
        if key is None:
            raise ValueError(
                f"{weights.path} has no tensor {name!r}; its weights do not fit its config.json"
            )
        stored = weights.tensors[key]
        if stored.shape != shape or not stored.dtype.is_floating_point:
            raise ValueError(
                f"tensor {key!r} of {weights.path} is {stored.shape} {stored.dtype}; config.json "
                f"says {shape}, and weights must have a floating dtype"
            )
        yield name, weights.read(key)


def spectra(
    weights: Iterable[tuple[str, Tensor]],
    preserved: Mapping[str, int],
    progress: Progress | None = None,
    *,
    points: int = 8,
) -> dict[str, Spectrum]:
    """The spectrum of each weight, given its preserved rank; `points`: see `summarise`."""
    found: dict[str, Spectrum] = {}
    for name, value in weights:
        found[name] = summarise(value, preserved[name], points)
        if progress is not None:
            progress(len(found), len(preserved), name)
    return found
