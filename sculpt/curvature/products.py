"""The matrix products that a module computes with one of its parameters, seen as they happen.

Mixtures of experts and layers of a model's own multiply inside of their `forward`: what they read,
and the gradient of what comes out, is in no argument or result of the module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LINEAR = (F.linear,)
MATMUL = (
    torch.matmul,
    torch.mm,
    torch.bmm,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.mm,
    Tensor.bmm,
)

Seen = Callable[[str, Tensor, Tensor, int | None, bool], Tensor | None]
"""Called with the name of the parameter, `x`, the product, the member of a stack (`None` for all of
it), and whether `x` is multiplied along the last dimension of the parameter; it may give another
tensor for the product."""


class Products(TorchFunctionMode):
    """Calls `seen` for each product with a parameter of `module`."""

    def __init__(self, module: nn.Module, parameters: Mapping[str, str], seen: Seen) -> None:
        super().__init__()
        self._module, self._parameters, self._seen = module, parameters, seen

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        product = function(*args, **(kwargs or {}))
        if function in LINEAR or function in MATMUL:
            x, weight = args[:2]
            for parameter, name in self._parameters.items():
                stored = getattr(self._module, parameter)
                if _shares(stored, weight):
                    at = None
                    if weight.ndim < stored.ndim:
                        offset = weight.storage_offset() - stored.storage_offset()
                        at = offset // stored.stride(0)
                    turned = weight.stride()[-2:] != stored.stride()[-2:]
                    last = (function in LINEAR) != turned
                    other = self._seen(name, x, product, at, last)
                    product = product if other is None else other
        return product


def _shares(stored: Tensor, weight: Any) -> bool:
    return (
        isinstance(weight, Tensor)
        and weight.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()
    )
