"""What a step sends between processes, counted and by formulas.

Per process and step, in the way of a ring: with `f = (N - 1) / N`, an all-gather of `b` bytes in
all sends `f b`, a reduce-scatter too, an all-reduce `2 f b`. All is counted before `f`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from launch import launch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sculpt import SculptConfig, Sculptor

WIDTH, LAYERS, RATIO = 64, 4, 0.25


def expected(kind: str, half: bool) -> int:
    """Bytes of a step: `b` of an element that is gathered, 4 of one that is reduced or stored.

    Of replicas, gradients are reduced. Of shards, weights are gathered twice and gradients reduced
    and scattered; sculpt gathers `V` in the forward and `U` in the backward too, and once a step
    the coordinates and the right basis that rows of the weight follow with.
    """
    n, t, b = WIDTH, WIDTH - math.floor((1 - RATIO) * WIDTH), 2 if half else 4
    return (
        LAYERS
        * {
            "plain replicas": 2 * 4 * n * n,
            "sculpt replicas": 2 * 4 * t * t,
            "plain shards": 2 * b * n * n + 4 * n * n,
            "sculpt shards": 2 * b * n * n + b * t * 2 * n + 4 * t * n + 2 * 4 * t * t,
        }[kind]
    )


class Wire(TorchDispatchMode):
    """Counts what collectives of this thread send; `bytes` by kind, before the factor `f`."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace in ("c10d", "_c10d_functional"):
            self._count(function._opname, args, result)
        return result

    def _count(self, name: str, args: Any, result: Any) -> None:
        if any(word in name for word in ("wait", "barrier", "wrap_tensor")):
            return
        if name == "broadcast_":
            tensors, factor = args[0], 1
        elif "gather" in name:  # The whole is in the result.
            tensors, factor = (args[0] if "_allgather" in name else result), 1
        elif "reduce_scatter" in name:  # The whole is in the input.
            tensors, factor = (args[1] if name.startswith("_reduce") else args[0]), 1
        elif "reduce" in name:
            tensors, factor = args[0], 2
        else:
            raise AssertionError(f"a collective that is not counted: {name}")
        leaves = [leaf for leaf in tree_leaves(tensors) if isinstance(leaf, torch.Tensor)]
        sent = factor * sum(leaf.numel() * leaf.element_size() for leaf in leaves)
        self.bytes[name] = self.bytes.get(name, 0) + sent


def count(kind: str, half: bool) -> int:
    """Bytes of one step, without the factor `f`; in each process of a group."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    policy = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)} if half else {}
    method, way = kind.split()
    if way == "shards":
        for layer in model:
            # The first layer after all others would not be gathered again in the backward.
            fully_shard(layer, reshard_after_forward=True, **policy)
        fully_shard(model, **policy)
    sculptor = None
    if method == "sculpt":
        sculptor = Sculptor(model, SculptConfig(unfreeze_rank_ratio=RATIO, skip_nonfinite=False))
        sculptor.begin_task()
    wrapped = DistributedDataParallel(model) if way == "replicas" else model
    optimizer = torch.optim.AdamW(sculptor.parameters() if sculptor else model.parameters())
    if sculptor:
        sculptor.attach(optimizer)
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(3):
        # What happens once, in the first steps, is not what a step costs.
        with Wire() as wire:
            wrapped(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return sum(wire.bytes.values())


CASES = [
    ("plain replicas", False),
    ("sculpt replicas", False),
    ("plain shards", False),
    ("sculpt shards", False),
    ("plain shards", True),
    ("sculpt shards", True),
]


def counted():
    return [count(*case) for case in CASES]


def test_formulas_hold_to_the_byte(tmp_path):
    for found in launch(2, counted, tmp_path):
        assert found == [expected(*case) for case in CASES]
    for half in (False, True):
        assert expected("sculpt shards", half) < expected("plain shards", half)
