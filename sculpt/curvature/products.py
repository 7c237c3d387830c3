"""Products with the weights of targets, and lookups in them, seen as they happen.

A weight is seen where it is used: in the `forward` of its layer, inside of a mixture of experts, or
in a function that reads it past both.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sculpt.task.targets import Place, Target
from sculpt_kernels import is_divided

# Of each function, at which places its two factors are, and their names.
MATMUL = (0, ("self", "input"), 1, ("other", "mat2", "tensor2"))
FACTORS: dict[Any, tuple[int, tuple[str, ...], int, tuple[str, ...]]] = {
    F.linear: (0, ("input",), 1, ("weight",)),
    F.embedding: (0, ("input",), 1, ("weight",)),
    torch.addmm: (1, ("mat1",), 2, ("mat2",)),
    Tensor.addmm: (1, ("mat1",), 2, ("mat2",)),
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm), MATMUL),
    **dict.fromkeys((Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm), MATMUL),
}


class Use(NamedTuple):
    """Vectors that a weight `(..., m, n)` meets, and what comes out.

    Attributes:
        at: the member of a stack; `None`: all of them, or no stack.
        x: what is read, `(..., N, n)`, or where `turned` `(..., N, m)`; rows looked up: indices.
        turned: `y = x W` and not `y = x Wᵀ`.
        columns: the vectors of `x` and of the product are their columns as they stand.
    """

    target: Target
    at: int | None
    x: Tensor
    turned: bool
    columns: bool = False


class Products(TorchFunctionMode):
    """Calls `seen` for each use of a weight, which may give another tensor for what comes out.

    Args:
        seen: called with the use and its result.
        gathered: called with the indices where vectors are taken out of several, as experts do.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        seen: Callable[[Use, Tensor], Tensor],
        gathered: Callable[[Tensor], None],
    ) -> None:
        super().__init__()
        self._places = [(target, place) for target in targets for place in target.places]
        sizes = {target.shape[-2:] for target in targets}
        self._sizes = sizes | {(n, m) for m, n in sizes}
        self._known: dict[int, tuple[Target, Place]] = {}
        self._seen, self._gathered = seen, gathered

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.dropout:  # Layers that recompute are in training mode.
            return args[0] if args else kwargs["input"]
        if function is F.multi_head_attention_forward:
            return self._attention(inspect.signature(function).bind(*args, **kwargs).arguments)
        result = function(*args, **kwargs)
        if function is Tensor.__getitem__:
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            for index in indices:
                if isinstance(index, Tensor) and index.ndim == 1 and index.dtype == torch.int64:
                    self._gathered(index)
        elif function in FACTORS:
            use = self._use(function, args, kwargs)
            if use is not None:
                return self._seen(use, result)
            if function is F.embedding and torch.is_grad_enabled() and not result.requires_grad:
                # Of layers that recompute only those have gradients whose inputs require some.
                result.requires_grad_()
        return result

    def _use(self, function: Any, args: Any, kwargs: Any) -> Use | None:
        i, names, j, others = FACTORS[function]
        x, y = _given(args, kwargs, i, names), _given(args, kwargs, j, others)
        found = self._find(y)
        first = found is None
        if found is None:
            if function in (F.linear, F.embedding) or (found := self._find(x)) is None:
                return None
            x, y = y, x
        target, place = found
        stored = getattr(place.module, place.parameter)
        if y.shape[-2:] == stored.shape[-2:] and y.stride()[-2:] == stored.stride()[-2:]:
            flipped = place.transposed
        elif y.mT.shape[-2:] == stored.shape[-2:] and y.mT.stride()[-2:] == stored.stride()[-2:]:
            flipped = not place.transposed
        else:
            return None  # Another view of the weight.
        at = None
        if y.ndim < stored.ndim:
            at = (y.storage_offset() - stored.storage_offset()) // stored.stride(0)
        elif y.shape[:-2] != stored.shape[:-2]:
            return None
        # `x yᵀ`, which `y x` is as well for the columns of `x`; otherwise `x y`.
        by_rows = first or function is F.linear
        return Use(target, at, x, by_rows == flipped, columns=first and x.ndim > 1)

    def _attention(self, given: dict[str, Any]) -> Any:
        """Attention of torch, whose last product is in it: first without, then by itself."""
        weight, bias = given["out_proj_weight"], given["out_proj_bias"]
        if self._find(weight) is None:
            return F.multi_head_attention_forward(**given)
        eye = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        given |= {"out_proj_weight": eye, "out_proj_bias": None}
        attended, shares = F.multi_head_attention_forward(**given)
        return self.__torch_function__(F.linear, (), (attended, weight, bias)), shares

    def _find(self, weight: Any) -> tuple[Target, Place] | None:
        """The target whose memory this is; a divided one lies elsewhere each time."""
        if not isinstance(weight, Tensor) or tuple(weight.shape[-2:]) not in self._sizes:
            return None
        if weight.layout is not torch.strided:
            return None
        key = weight.untyped_storage()._cdata
        known = self._known.get(key)
        if known is not None and _holds(known[1], weight):
            return known
        for found in self._places:
            if _holds(found[1], weight):
                self._known[key] = found
                return found
        return None


def _given(args: Any, kwargs: Any, at: int, names: tuple[str, ...]) -> Any:
    return args[at] if len(args) > at else next((kwargs[k] for k in names if k in kwargs), None)


def _holds(place: Place, weight: Tensor) -> bool:
    stored = getattr(place.module, place.parameter, None)
    if not isinstance(stored, Tensor) or is_divided(stored):
        return False
    inside = weight.storage_offset() - stored.storage_offset()
    return weight.untyped_storage()._cdata == stored.untyped_storage()._cdata and 0 <= inside < max(
        1, stored.numel()
    )
