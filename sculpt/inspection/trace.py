"""One forward and backward pass on tensors without values: its FLOPs, and the bytes alive in it.

Whatever the architecture does, attention, norms, the head and the loss included, is seen and
counted; nothing is computed and nothing but shapes is stored.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]


def _added_product(total: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
    return 2 * int(left[0] * left[1] * right[1])


# The counter knows the attention kernels of GPUs only, and no product that is added in place.
MORE = {
    torch.ops.aten.addmm_: _added_product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class _AnyModule(nullcontext[None]):
    """In place of the counter's list of running modules, which keeps recomputed tensors alive."""

    parents = frozenset({"Global"})


@dataclass(frozen=True)
class Pass:
    """What one forward and backward pass takes.

    Attributes:
        flops: of matrix products and attention, the latter counted in full.
        kept: bytes that the forward leaves for the backward, parameters and inputs not counted.
        peak: largest number of bytes alive at one time, gradients of parameters included.
        rows: for each named module its rows of input, and whether that input carries a gradient.
    """

    flops: int
    kept: int
    peak: int
    rows: dict[str, tuple[int, bool]]


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensor storages that were made inside and still exist."""

    def __init__(self, outside: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._outside = {tensor.untyped_storage()._cdata for tensor in outside}
        self._inside: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._outside or key in self._inside:
            return
        self._inside[key] = weakref.finalize(storage, self._forget, key, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> None:
        del self._inside[key]
        self.live -= size


def trace_pass(
    model: nn.Module, loss: Callable[[], Tensor], inputs: Iterable[Tensor], named: Iterable[str]
) -> Pass:
    """Run `loss()` and its backward and count; gradients are left at `None`.

    Args:
        model: whose parameters and buffers are held anyway, not by the pass.
        loss: runs the model on `inputs`.
        named: modules whose rows of input are wanted.
    """
    with _input_rows(model, named) as rows, counted(model, inputs) as (counter, live):
        value = loss()
        kept = live.live
        value.backward()  # type: ignore[no-untyped-call]
        flops, peak = counter.get_total_flops(), live.peak
    model.zero_grad(set_to_none=True)
    return Pass(flops, kept, peak, rows)


@contextmanager
def counted(
    model: nn.Module, inputs: Iterable[Tensor]
) -> Iterator[tuple[FlopCounterMode, LiveBytes]]:
    """Count FLOPs, and bytes beside those of the model and its inputs."""
    # Modules may hold tensors as plain attributes, too.
    attributes = (value for module in model.modules() for value in vars(module).values())
    hidden = [value for value in attributes if isinstance(value, Tensor)]
    live = LiveBytes([*model.parameters(), *model.buffers(), *inputs, *hidden])
    counter = FlopCounterMode(display=False, custom_mapping=MORE)
    counter.mod_tracker = _AnyModule()  # type: ignore[assignment]
    with counter, live:
        yield counter, live


@contextmanager
def _input_rows(model: nn.Module, named: Iterable[str]) -> Iterator[dict[str, tuple[int, bool]]]:
    rows: dict[str, tuple[int, bool]] = {}

    def add_hook(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if name not in rows and args and isinstance(args[0], Tensor):
                x = args[0]
                rows[name] = (x.numel() // max(1, x.shape[-1]), x.requires_grad)

        return model.get_submodule(name).register_forward_pre_hook(hook)

    handles = [add_hook(name) for name in named]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()
