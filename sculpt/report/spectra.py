"""Singular values of the matrices of a saved model, for pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from sculpt.config import SculptConfig
from sculpt.storage.weights import StoredWeights
from sculpt.task.ranks import preserved_rank

PLACES = 48
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Spectrum:
    """One matrix: its name, `k = min(m, n)`, preserved rank, and the energy in these directions.

    shares: `σ_i / σ_1` at `PLACES` even places from the first to the last.
    """

    name: str
    size: int
    preserved: int
    energy: float
    shares: tuple[float, ...]


def cost(weights: StoredWeights, names: list[str]) -> float:
    """Floating-point operations that `spectra` takes, roughly."""
    total = 0.0
    for name in names:
        short, long = sorted(weights.tensors[f"{name}.weight"].shape[-2:])
        total += 2.0 * short**2 * long + 3.0 * short**3
    return total


def spectra(
    model: Path, names: list[str], config: SculptConfig, progress: Progress | None = None
) -> list[Spectrum]:
    """Spectra of the matrices `names` in the model directory, by eigenvalues of Gram matrices.

    Names that are not in the directory, or are stacks of matrices, are left out.
    """
    weights = StoredWeights(model)
    found = []
    for done, name in enumerate(names, start=1):
        stored = weights.tensors.get(f"{name}.weight")
        if stored is not None and len(stored.shape) == 2:
            W = weights.read(f"{name}.weight").double()
            squares = torch.linalg.eigvalsh(W @ W.mT if W.shape[0] <= W.shape[1] else W.mT @ W)
            squares = squares.flip(0).clamp_min(0)
            k = len(squares)
            h = preserved_rank(name, (stored.shape[0], stored.shape[1]), config)
            places = torch.linspace(0, k - 1, min(k, PLACES)).round().long()
            shares = (squares[places] / squares[0].clamp_min(1e-300)).sqrt()
            energy = float(squares[:h].sum() / squares.sum().clamp_min(1e-300))
            found.append(Spectrum(name, k, h, energy, tuple(shares.tolist())))
        if progress is not None:
            progress(done, len(names), name)
    return found
