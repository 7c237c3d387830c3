"""Stand-ins for the layers of PEFT, with the same arithmetic and the same tensors, to be traced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Adapted(nn.Module):
    """A layer with something beside it; some models look at the weight of their layers."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Any:
        return self.base.weight


class LoraLayer(Adapted):
    """`base(x) + B(A(x)) / r`: `A` `(r, n)`, `B` `(m, r)`; 16-bit models get float32 adapters."""

    def __init__(self, base: nn.Module, shape: tuple[int, int], rank: int) -> None:
        super().__init__(base)
        m, n = shape
        self.dtype = torch.promote_types(next(base.parameters()).dtype, torch.float32)
        self.A = nn.Linear(n, rank, bias=False, dtype=self.dtype)
        self.B = nn.Linear(rank, m, bias=False, dtype=self.dtype)

    def forward(self, x: Tensor) -> Any:
        result = self.base(x)
        return (result + self.B(self.A(x.to(self.dtype))) * 0.5).to(result.dtype)


class OsfLayer(Adapted):
    """`base(x) + x ΔWᵀ`, `ΔW = U_l S_l V_l - U_0 S_0 V_0`, as one product of rank `2t`."""

    def __init__(self, base: nn.Module, shape: tuple[int, int], rank: int) -> None:
        super().__init__(base)
        m, n = shape
        dtype = torch.promote_types(next(base.parameters()).dtype, torch.float32)
        U, S, V = (torch.empty(size, dtype=dtype) for size in ((m, rank), (rank,), (rank, n)))
        self.U, self.S, self.V = nn.Parameter(U), nn.Parameter(S), nn.Parameter(V)
        self.start = nn.ParameterList(nn.Parameter(X.clone(), False) for X in (U, S, V))

    def forward(self, x: Tensor) -> Any:
        result = self.base(x)
        U, S, V = self.start
        out = torch.cat([self.U * self.S, -(U * S)], dim=1)  # [m, 2t]
        into = torch.cat([self.V, V], dim=0)  # [2t, n]
        delta = nn.functional.linear(nn.functional.linear(x.to(into.dtype), into), out)
        return result + delta.to(result.dtype)
