"""Bytes that training sends between processes: formulas, and what is counted at small scale.

    python -m bench.traffic            # count, compare with the formulas, write a result
    python -m bench.traffic --models   # the formulas for models of 7B, 70B and 405B parameters

Per process and step, in the way of a ring: with `f = (N - 1) / N`, an all-gather of `b` bytes in
all sends `f b`, a reduce-scatter too, an all-reduce `2 f b`.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sculpt import SculptConfig, Sculptor

WIDTH, LAYERS, RATIO = 64, 4, 0.25
RESULT = Path(__file__).parent / "results" / "traffic.json"
# Hidden, feed-forward and key-value width, and layers.
MODELS = {
    "LLaMA-2-7B": (4096, 11008, 4096, 32),
    "LLaMA-3-70B": (8192, 28672, 1024, 80),
    "LLaMA-3-405B": (16384, 53248, 1024, 126),
}


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


def _process(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/s", rank=rank, world_size=size)
    found = [
        {
            "kind": kind,
            "bfloat16": half,
            "counted": count(kind, half),
            "formula": expected(kind, half),
        }
        for kind, half in CASES
    ]
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measure(size: int) -> list[dict[str, Any]]:
    """All cases in `size` processes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, args=(size, folder), nprocs=size)
        found: list[dict[str, Any]] = json.loads((Path(folder) / "found.json").read_text())
    return found


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", action="store_true")
    options = parser.parse_args()
    if options.models:
        for name, sizes in MODELS.items():
            for ratio in (0.25, 0.125):
                found = of_model(*sizes, ratio)
                cells = " | ".join(f"{value:.3g}" for value in found.values())
                print(f"| {name} | {ratio} | {cells} |")
        return
    results = {
        "width": WIDTH, "layers": LAYERS, "ratio": RATIO, "torch": torch.__version__,
        "sizes": asdict(Bytes()), "counted": {size: measure(size) for size in (2, 4)},
    }  # fmt: skip
    RESULT.write_text(json.dumps(results, indent=1) + "\n")
    for size, rows in results["counted"].items():
        for row in rows:
            print(size, row["kind"], "bfloat16" if row["bfloat16"] else "float32",
                  row["counted"], row["formula"])  # fmt: skip


if __name__ == "__main__":
    main()
