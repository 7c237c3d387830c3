"""The layer during a task: an `nn.Linear` whose weight moves through coordinates only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sculpt_kernels import compact_linear

COORDINATES = "sculpt_C"
BASES = ("sculpt_U", "sculpt_V")


class CompactLinear(nn.Linear):
    """`y = x Wᵀ + bias` with `W = W₀ + U C Vᵀ`, trained through `C` `(t, t)`.

    A module becomes one by a change of class and turns back the same way, so names, hooks and
    references stay. `C` and the bases stay out of `state_dict`, which is that of `nn.Linear`
    at every moment.
    """

    sculpt_C: nn.Parameter
    sculpt_U: Tensor
    sculpt_V: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return compact_linear(
            input, self.weight, self.bias, self.sculpt_U, self.sculpt_V, self.sculpt_C
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, trainable_rank={self.sculpt_C.shape[0]}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + COORDINATES, None)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if prefix + COORDINATES in missing:
            missing.remove(prefix + COORDINATES)


def make_compact(module: nn.Linear, U: Tensor, V: Tensor) -> CompactLinear:
    """Turn a linear layer into one that trains `C`, from zero, in the bases `U`, `V`."""
    C = torch.zeros(U.shape[1], V.shape[1], dtype=U.dtype, device=U.device, requires_grad=True)
    module.weight.requires_grad_(False)
    module.__class__ = CompactLinear
    assert isinstance(module, CompactLinear)
    module.register_parameter(COORDINATES, nn.Parameter(C))
    for name, basis in zip(BASES, (U, V), strict=True):
        module.register_buffer(name, basis, persistent=False)
    return module


def make_plain(module: CompactLinear) -> nn.Linear:
    """Turn the layer back into a plain `nn.Linear`; its weight stays as it is."""
    for name in (COORDINATES, *BASES):
        delattr(module, name)
    module.__class__ = nn.Linear  # type: ignore[assignment]
    return module
