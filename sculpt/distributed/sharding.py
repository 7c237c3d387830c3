"""Weights, bases and coordinates of a model that `fully_shard` has divided over processes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sculpt_kernels import is_divided

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """What this process has of it, sharing memory."""
    return tensor.to_local() if is_divided(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every process."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


def device_of(weight: Tensor) -> torch.device:
    """Where the processes compute, which an offloaded weight is not."""
    if is_divided(weight) and weight.device_mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return weight.device


def why_not_divided(weight: DTensor) -> str | None:
    """Why a weight that is divided like this cannot be sculpted."""
    from torch.distributed.tensor import Replicate, Shard

    divided = [placement for placement in weight.placements if type(placement) is Shard]
    others = [p for p in weight.placements if type(p) not in (Shard, Replicate)]
    if len(divided) == 1 and not others:
        return None
    return (
        f"its weight is divided as {weight.placements}; fully_shard, which divides along one "
        "dimension, is supported"
    )


def as_shard(of: Tensor, part: Tensor) -> Tensor:
    """`part` seen as the shard of a tensor that is divided as `of`; sharing memory."""
    if not is_divided(of):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, of.device_mesh, of.placements, shape=of.shape, stride=of.stride()
    )


def like_shards(weight: Tensor, tensor: Tensor, *, stack: bool) -> Tensor:
    """The rows of `tensor` that this process keeps of it, where `weight` is divided.

    Args:
        stack: `weight` is `(count, m, n)`; where it is divided along `count`, so is `tensor`.
    """
    if not is_divided(weight):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    placements = _placements(weight, stack)
    # A chunk alone would keep the memory of the whole.
    divided = distribute_tensor(tensor, weight.device_mesh, placements, src_data_rank=None)
    return as_shard(divided, divided.to_local().clone())


def zeros(weight: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Coordinates at the start of a task, divided by rows where `weight` is divided."""
    if not is_divided(weight):
        return torch.zeros(shape, dtype=dtype, device=weight.device)
    from torch.distributed.tensor import zeros as divided_zeros

    placements = _placements(weight, len(shape) == 3)
    return divided_zeros(shape, dtype=dtype, device_mesh=weight.device_mesh, placements=placements)


def _placements(weight: DTensor, stack: bool) -> list[Any]:
    """Divided along the stack where the weight is, else by rows; replicas stay replicas."""
    from torch.distributed.tensor import Replicate, Shard

    along_stack = stack and any(
        isinstance(placement, Shard) and placement.dim == 0 for placement in weight.placements
    )
    rows = Shard(0 if along_stack or not stack else 1)
    return [rows if isinstance(p, Shard) else Replicate() for p in weight.placements]


def average(C: DTensor) -> Tensor:
    """What stands for divided coordinates in a layer, where their values are not read.

    A tensor of the whole shape, without memory; its gradient, found for the whole by each process,
    becomes the mean over all, of which each keeps its share (one reduce-scatter).
    """
    placeholder: Tensor = _Averaged.apply(C)  # type: ignore[no-untyped-call]
    return placeholder


class _Averaged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, C: DTensor) -> Tensor:
        ctx.mesh, ctx.placements = C.device_mesh, C.placements
        return C.to_local().new_empty(()).expand(C.shape)

    @staticmethod
    def backward(ctx: Any, dC: Tensor) -> DTensor:
        from torch.distributed.tensor import DTensor, Partial

        mesh = ctx.mesh
        partial = DTensor.from_local(dC / mesh.size(), mesh, [Partial()] * mesh.ndim)
        return partial.redistribute(placements=ctx.placements)


def sharded_modules(model: nn.Module) -> list[Any]:
    """Those that `fully_shard` was called on."""
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(modules: list[Any]) -> None:
    """Let go of gathered weights, which would not follow what happens to their shards."""
    for module in modules:
        module.reshard()
