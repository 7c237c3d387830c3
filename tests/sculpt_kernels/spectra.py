"""Matrices with planted singular values."""

from __future__ import annotations

import torch


def planted(m: int, n: int, spectrum: torch.Tensor) -> torch.Tensor:
    g = torch.Generator().manual_seed(m + 7 * n)
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(m, k, generator=g, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64)).Q
    return (U * spectrum.double()) @ V.T


SPECTRA = {
    "power law": lambda k: torch.arange(1, k + 1) ** -0.5,
    "flat with spikes": lambda k: torch.where(torch.arange(k) < 3, 10.0, 1.0),
    "repeated at the cut": lambda k: torch.where(torch.arange(k) < k // 2 + 3, 1.0, 0.1),
    "exact rank below the cut": lambda k: (torch.arange(k) < k // 4).double(),
    "exact rank above the cut": lambda k: (torch.arange(k) < k // 2 + 2).double(),
    "zero": lambda k: torch.zeros(k),
    "steep": lambda k: torch.logspace(0, -6, k),
}
