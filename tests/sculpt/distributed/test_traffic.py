"""What a step sends between processes, counted and by formulas.

Per process and step, in the way of a ring: with `f = (N - 1) / N`, an all-gather of `b` bytes in
all sends `f b`, a reduce-scatter too, an all-reduce `2 f b`. All is counted before `f`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Bytes:
    """Sizes of an element: gathered weights and bases, reduced gradients, stored bases."""

    gathered: int = 4
    reduced: int = 4
    basis: int = 4
    coordinate: int = 4


def plain_replicas(m: int, n: int, b: Bytes) -> int:
    """DistributedDataParallel: the gradient is reduced."""
    return 2 * b.reduced * m * n


def sculpt_replicas(m: int, n: int, t: int, b: Bytes) -> int:
    """The gradient of the coordinates is reduced."""
    return 2 * b.coordinate * t * t


def plain_shards(m: int, n: int, b: Bytes) -> int:
    """fully_shard: the weight is gathered twice, its gradient reduced and scattered."""
    return 2 * b.gathered * m * n + b.reduced * m * n


def sculpt_shards(m: int, n: int, t: int, b: Bytes) -> int:
    """fully_shard: gathered are the weight twice, `V` in the forward, `U` in the backward, and once
    a step the coordinates and the right basis that rows of the weight follow with; the gradient of
    the coordinates is reduced and scattered."""
    passes = 2 * b.gathered * m * n + b.gathered * t * (m + n)
    return passes + b.basis * t * n + 2 * b.coordinate * t * t


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


def count(kind: str, half: bool = False) -> int:
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


def expected(kind: str, half: bool = False) -> int:
    """What `count` must find."""
    t = WIDTH - math.floor((1 - RATIO) * WIDTH)
    sizes = Bytes(gathered=2) if half else Bytes()
    one = {
        "plain replicas": plain_replicas(WIDTH, WIDTH, sizes),
        "sculpt replicas": sculpt_replicas(WIDTH, WIDTH, t, sizes),
        "plain shards": plain_shards(WIDTH, WIDTH, sizes),
        "sculpt shards": sculpt_shards(WIDTH, WIDTH, t, sizes),
    }
    return LAYERS * one[kind]


CASES = [
    ("plain replicas", False),
    ("sculpt replicas", False),
    ("plain shards", False),
    ("sculpt shards", False),
    ("plain shards", True),
    ("sculpt shards", True),
]


def of_model(hidden: int, inner: int, kv: int, layers: int, ratio: float) -> dict[str, float]:
    """GB (1e9 bytes) of one step of all linear layers, before `f`, and of memory, before `1/N`.

    bfloat16 is gathered, float32 reduced. Memory: bfloat16 weights and float32 bases, coordinates,
    their gradients and moments against float32 weights, gradients and moments of AdamW.
    """
    shapes = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    sizes = Bytes(gathered=2)
    total = dict.fromkeys(
        ("plain DDP", "sculpt DDP", "plain", "sculpt", "plain memory", "memory"), 0.0
    )
    for m, n in shapes:
        t = min(m, n) - math.floor((1 - ratio) * min(m, n))
        for key, value in {
            "plain DDP": plain_replicas(m, n, sizes),
            "sculpt DDP": sculpt_replicas(m, n, t, sizes),
            "plain": plain_shards(m, n, sizes),
            "sculpt": sculpt_shards(m, n, t, sizes),
            "plain memory": 16 * m * n,
            "memory": 2 * m * n + 4 * t * (m + n) + 20 * t * t,
        }.items():
            total[key] += value * layers / 1e9
    return total


def counted():
    return [count(*case) for case in CASES]


def test_formulas_hold_to_the_byte(tmp_path):
    for found in launch(2, counted, tmp_path):
        assert found == [expected(*case) for case in CASES]


def test_less_than_plain_training():
    assert expected("sculpt replicas") * 16 == expected("plain replicas")
    for half in (False, True):
        assert expected("sculpt shards", half) < expected("plain shards", half)
    large = of_model(16384, 53248, 1024, 126, 0.25)
    assert large["sculpt"] < large["plain"]
    assert large["memory"] < large["plain memory"]
