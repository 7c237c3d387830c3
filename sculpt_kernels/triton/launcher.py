"""What the launchers share: the way to launch, scalars, batches, and what can run at all."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from sculpt_kernels.triton import tiles
from sculpt_kernels.triton.common import INTERPRETED
from sculpt_kernels.triton.tiles import TileConfig

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Launch:
    """One launch, as a launcher asked for it."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, int | bool]


@dataclass(frozen=True)
class Listed:
    """Matrices that lie anywhere: the first one, for their layout, and the addresses of all."""

    first: Tensor
    addresses: Tensor

    @classmethod
    def of(cls, matrices: Sequence[Tensor]) -> Listed:
        """Matrices `(m, n)` of one layout."""
        pointers = tuple(X.data_ptr() for X in matrices)
        return cls(matrices[0][None], address_table(pointers, matrices[0].device))


_recorded: list[Launch] | None = None


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect launches instead of running them; offline compilation sees what a device would."""
    global _recorded
    _recorded, launches = [], _recorded
    try:
        yield _recorded
    finally:
        _recorded = launches


def launch(
    kernel: Any, programs: int, config: TileConfig, device: torch.device, **arguments: Any
) -> None:
    """Run `programs` programs of `kernel` on `device`, with the tile sizes that it asks for."""
    if programs == 0:
        return
    options = config.options()
    sizes = config.sizes().items()
    arguments |= {name: size for name, size in sizes if name in kernel.arg_names}
    if _recorded is not None:
        _recorded.append(Launch(kernel, programs, arguments, options))
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](**arguments, **options)


def operands(kernel: Any, **tensors: Tensor | Listed) -> dict[str, Any]:
    """Each `(L, rows, columns)` tensor `x` as arguments of `kernel`: `X` and its `stride_x?`.

    The stride of a single matrix is 0.
    """
    arguments: dict[str, Any] = {}
    for name, X in tensors.items():
        layout = X.first if isinstance(X, Listed) else X
        arguments[name.upper()] = X.addresses if isinstance(X, Listed) else X
        strides = (layout.stride(0) if layout.shape[0] > 1 else 0, *layout.stride()[1:])
        arguments |= zip(_stride_names(kernel, name), strides, strict=True)
    return arguments


@lru_cache
def _stride_names(kernel: Any, name: str) -> list[str]:
    return [key for key in kernel.arg_names if re.fullmatch(f"stride_{name}[a-z]", key)]


def tile_count(config: TileConfig, X: Tensor) -> int:
    """Tiles of all matrices of `X` `(L, m, n)`."""
    count, m, n = X.shape
    return count * -(-m // config.block_m) * -(-n // config.block_n)


def unsupported(*tensors: Tensor | None) -> str | None:
    """Why no kernel can run on these tensors: their device or dtype; `None` if one can."""
    for X in tensors:
        if X is None:
            continue
        if X.dtype not in DTYPES:
            return f"the Triton kernels have no {str(X.dtype).removeprefix('torch.')}"
        if X.device.type == "cuda":
            if capability(X.device) < (8, 0):
                return "the Triton kernels need compute capability 8.0 or newer"
        elif not INTERPRETED:
            return f"the Triton kernels run on CUDA devices; the tensors are on {X.device}"
    return None


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; that of the target while launches are recorded or interpreted."""
    if device.type == "cuda":
        return _device_capability(device.index or 0)
    return target_capability


target_capability = (9, 0)


@lru_cache
def _device_capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def input_precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: as `torch.set_float32_matmul_precision` says."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


def choose(kernel: str, dtype: torch.dtype, device: torch.device) -> TileConfig:
    return tiles.choose(kernel, dtype, capability(device))


def number(x: float | Tensor, device: torch.device) -> float | Tensor:
    """A scalar as a kernel takes it: a 0-d tensor on its device stays there, without a wait."""
    if isinstance(x, Tensor) and x.device == device:
        return x
    x = float(x)
    return torch.tensor(x, dtype=torch.float64) if INTERPRETED else x


def whole(x: int | Tensor, device: torch.device) -> int | Tensor:
    """As `number`, for integers of 64 bits, which unsigned ones wrap into."""
    if isinstance(x, Tensor) and x.device == device:
        return x
    x = (int(x) + 2**63) % 2**64 - 2**63
    return torch.tensor(x) if INTERPRETED else x


def address_table(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    """Addresses of many tensors, on their device; built once, so graphs can be captured."""
    table = _address_table(pointers, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured[pointers, device] = table
    return table


# Graphs read their tables at every replay, also when the cache has long dropped them.
_captured: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}


@lru_cache(maxsize=256)
def _address_table(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(pointers, dtype=torch.int64, device=device)


def common_vector(*tensors: Tensor) -> int:
    """Elements in 16 bytes of the widest dtype."""
    return 16 // max(X.element_size() for X in tensors)


def near(config: TileConfig, *tensors: Tensor) -> bool:
    """Whether the elements of one tile of each tensor lie within 2**31 elements of its first."""
    return all(
        config.block_m * abs(X.stride(-2)) + config.block_n * abs(X.stride(-1)) < 2**31
        for X in tensors
    )


def batches(X: Tensor, *others: Tensor | None) -> Iterator[tuple[int, list[Any]]]:
    """Three-dimensional views of `X` and of what goes with it, without a copy.

    Yields the index of the first matrix and the views. One group, unless the batch dimensions of
    an operand do not merge into one stride. Two-dimensional operands are shared by stride 0.
    """
    yield from _batches(X, others, 0)


def _batches(X: Tensor, others: tuple[Tensor | None, ...], first: int) -> Iterator[Any]:
    views = [_three(X, X), *(None if Y is None else _three(Y, X) for Y in others)]
    if all(view is not None or Y is None for view, Y in zip(views, (X, *others), strict=True)):
        yield first, views
        return
    below = X[0].numel() // max(1, X.shape[-1] * X.shape[-2])
    for index in range(X.shape[0]):
        inner = tuple(Y if Y is None or Y.ndim == 2 else Y[index] for Y in others)
        yield from _batches(X[index], inner, first + index * below)


def _three(Y: Tensor, X: Tensor) -> Tensor | None:
    count = X.shape[:-2].numel()
    if Y.ndim == 2:
        return Y.expand(count, *Y.shape)
    try:
        return Y.view(count, *Y.shape[-2:])
    except RuntimeError:
        return None
