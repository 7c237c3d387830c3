"""Wrappers and weights without values, which a task cannot begin on."""

from __future__ import annotations

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from sculpt.distributed.sharding import sharded_modules
from sculpt_kernels import is_divided

WRAP_LATER = (
    "call begin_task() on the plain model first, then wrap it, DistributedDataParallel(model); "
    "every task takes a new wrapper"
)


def refuse_hidden_weights(model: nn.Module) -> None:
    """Refuse what leaves the modules without the values of their weights, by name.

    Raises:
        ValueError: the model is inside of such a wrapper.
    """
    for path, module in model.named_modules():
        kind = type(module).__name__
        if kind == "DistributedDataParallel":
            raise ValueError(
                f"{path or 'model'} is a DistributedDataParallel, which averages the gradients "
                f"that trained when it was made: {WRAP_LATER}"
            )
        if kind == "FullyShardedDataParallel":
            raise ValueError(
                f"{path or 'model'} is a FullyShardedDataParallel (FSDP1), which flattens matrices "
                "away; use torch.distributed.fsdp.fully_shard (FSDP2)"
            )
    by_fully_shard = bool(sharded_modules(model))
    for name, parameter in model.named_parameters():
        if is_divided(parameter) and not by_fully_shard:
            raise ValueError(
                f"{name} is divided, and no part of the model by fully_shard: tensor parallelism "
                "is not supported; use torch.distributed.fsdp.fully_shard (FSDP2)"
            )
        if is_lazy(parameter):
            raise ValueError(
                f"{name} is not initialised and takes its shape from the first batch: call the "
                "model once, then begin_task()"
            )
        if parameter.is_meta and not isinstance(parameter, FakeTensor):
            raise ValueError(
                f"{name} is on the meta device and has no values: after fully_shard, "
                "model.to_empty(device=...) and load the weights, then begin_task()"
            )
        if hasattr(parameter, "ds_id"):
            raise ValueError(
                f"{name} is partitioned by DeepSpeed ZeRO-3, which leaves modules without their "
                "matrices; use torch.distributed.fsdp.fully_shard (FSDP2), or ZeRO-1 or ZeRO-2"
            )
