"""Spectra without an eigendecomposition: stochastic Lanczos quadrature, products with `S` only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sculpt_kernels.subspaces.sketch import sketch

STEPS = 60


def probes(k: int) -> int:
    """Random probes: the standard error of a count is at most `k^½ / (2 probes)^½`."""
    return min(10, max(4, 6000 // k))


@dataclass(frozen=True)
class Density:
    """Eigenvalue density of symmetric positive semi-definite matrices `(..., k, k)`.

    Attributes:
        nodes: `(..., probes, steps)` Ritz values, rising.
        weights: `(..., probes, steps)`, each probe's sum to 1: share of the `k` eigenvalues.
        k: size of the matrices.
    """

    nodes: Tensor
    weights: Tensor
    k: int

    def threshold(self, count: Tensor) -> Tensor:
        """`(...)` values with about `count` of the `k` eigenvalues above them."""
        nodes, order = self.nodes.flatten(-2).sort(-1)
        weights = self.weights.flatten(-2).gather(-1, order) / self.weights.shape[-2]
        # A node stands for a neighbourhood: half of its weight lies on either side of it.
        above = weights.flip(-1).cumsum(-1).flip(-1) - weights / 2
        return _interpolate((count / self.k).unsqueeze(-1), above.flip(-1), nodes.flip(-1))

    def rank_for(self, energy: float) -> tuple[Tensor, Tensor]:
        """Least rank that keeps a share `energy` of the trace, and its standard error, `(...)`."""
        mass = self.nodes.clamp_min(0) * self.weights
        share = mass.flip(-1).cumsum(-1) - mass.flip(-1) / 2
        share = share / mass.sum(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
        count = self.weights.flip(-1).cumsum(-1) - self.weights.flip(-1) / 2
        target = torch.full_like(share[..., :1], energy)
        ranks = self.k * _interpolate(target, share, count)
        return ranks.mean(-1), ranks.std(-1) / ranks.shape[-1] ** 0.5


def density(S: Tensor, seed: int) -> Density:
    """Lanczos on random probes, re-orthogonalised in full; blocked, no host synchronisation.

    Ubaru, Chen, Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", SIAM J.
    Matrix Anal. Appl. 38 (2017): the Ritz values of each probe are quadrature nodes, the squared
    first components of their vectors the weights.
    """
    k = S.shape[-1]
    steps = min(STEPS, k)
    q = sketch(k, probes(k), seed, dtype=S.dtype, device=S.device)
    q = q.expand(*S.shape[:-2], k, q.shape[-1])
    q = q / torch.linalg.vector_norm(q, dim=-2, keepdim=True)
    basis = [q]
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    tiny = torch.finfo(S.dtype).tiny
    for step in range(steps):
        v = S @ basis[-1]
        alphas.append((v * basis[-1]).sum(-2))
        if step == steps - 1:
            break
        # Twice is enough: against all earlier vectors of the same probe.
        stack = torch.stack(basis, dim=-1)
        for _ in range(2):
            v = v - (stack * (stack * v.unsqueeze(-1)).sum(-3, keepdim=True)).sum(-1)
        beta = torch.linalg.vector_norm(v, dim=-2)
        betas.append(beta)
        basis.append(v / beta.clamp_min(tiny).unsqueeze(-2))
    T = torch.diag_embed(torch.stack(alphas, -1))
    if betas:
        off = torch.diag_embed(torch.stack(betas, -1), offset=1)
        T = T + off + off.mT
    nodes, vectors = torch.linalg.eigh(T)
    return Density(nodes, vectors[..., 0, :].square(), k)


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise linear through rising `xs` `(..., p)`; constant beyond the ends; `(...)`."""
    right = torch.searchsorted(xs.contiguous(), x.contiguous()).clamp(1, xs.shape[-1] - 1)
    x0, x1 = xs.gather(-1, right - 1), xs.gather(-1, right)
    y0, y1 = ys.gather(-1, right - 1), ys.gather(-1, right)
    slope = ((x - x0) / (x1 - x0).clamp_min(torch.finfo(xs.dtype).tiny)).clamp(0, 1)
    return (y0 + slope * (y1 - y0)).squeeze(-1)
