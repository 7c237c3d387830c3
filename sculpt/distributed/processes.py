"""What processes that train one model exchange: JSON, flags, tensors, and shares of the work."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Processes:
    """The members of a process group, or this process alone where there is none.

    Nothing is pickled: what is no tensor goes as JSON.

    Args:
        group: `None` is the default group, if `torch.distributed` was initialised.
        device: where the tensors of collectives live.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.group = group
        self.device = device
        self.size = dist.get_world_size(group) if together else 1
        self.rank = dist.get_rank(group) if together else 0

    def apart(self) -> Processes:
        """The same processes in a group of their own, for another thread: gloo, on the CPU.

        What two threads say in one group would be mixed up.
        """
        group = None
        if self.size > 1:
            members = dist.get_process_group_ranks(self.group or dist.group.WORLD)
            group = dist.new_group(members, backend="gloo", use_local_synchronization=True)
        return Processes(group, torch.device("cpu"))

    def alone(self) -> Processes:
        """This process, as if there were no other."""
        alone = copy(self)
        alone.size, alone.rank = 1, 0
        return alone

    def tell(self, value: Any) -> list[Any]:
        """What every process has said, in the order of their ranks; `value` as JSON holds it."""
        text = json.dumps(value)
        if self.size == 1:
            return [json.loads(text)]
        own = torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8).to(self.device)
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([own.numel()], device=self.device), self.group)
        sizes = [int(length) for length in lengths]
        padded = own.new_zeros(max(sizes))
        padded[: own.numel()] = own
        texts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(texts, padded, self.group)
        return [
            json.loads(bytes(part[:size].tolist()).decode("utf-8"))
            for part, size in zip(texts, sizes, strict=True)
        ]

    def require_equal(self, about: Mapping[str, Any]) -> None:
        """Refuse to go on where the processes do not agree.

        Raises:
            ValueError: on all of them; it names what differs first, and who says what.
        """
        if self.size == 1:
            return
        said = self.tell({key: json.dumps(value, sort_keys=True) for key, value in about.items()})
        for key in about:
            for rank, other in enumerate(said):
                if other.get(key) != said[0].get(key):
                    first, second = _difference(
                        key, json.loads(said[0][key]), json.loads(other[key])
                    )
                    raise ValueError(
                        f"the processes do not agree: rank 0 has {first}, rank {rank} has "
                        f"{second}; a task needs the same on all {self.size} ranks"
                    )

    def fail_together(self, error: Exception | None) -> None:
        """Raise on every process what went wrong on one, so that none waits for the others.

        Raises:
            RuntimeError: another process failed. Its own error where it was this one.
        """
        said = self.tell(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, text in enumerate(said):
            if text is not None:
                raise RuntimeError(f"rank {rank} failed: {text}")

    def any(self, here: bool) -> bool:
        """Whether it is so on any of them."""
        if self.size == 1:
            return here
        flag = torch.tensor(here, dtype=torch.int32, device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX, self.group)
        return bool(flag)

    @contextmanager
    def as_one(self) -> Iterator[bool]:
        """A block at whose end all wait; it gets `True` on the first process.

        Raises:
            RuntimeError: where the block raises on another. Its own error where it does here.
        """
        error = None
        try:
            yield self.rank == 0
        except Exception as problem:
            error = problem
        self.fail_together(error)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Give everybody the values that `source` has, in place."""
        if self.size > 1:
            dist.broadcast(tensor, group=self.group, group_src=source)


def _difference(key: str, a: Any, b: Any) -> tuple[str, str]:
    """Where two values that differ do so, in words."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in [*a, *(name for name in b if name not in a)]:
            if name not in a or name not in b:
                return tuple(  # type: ignore[return-value]
                    f"{key} {name!r}" if name in side else f"no {key} {name!r}" for side in (a, b)
                )
            if json.dumps(a[name]) != json.dumps(b[name]):
                return f"{key} {name}={a[name]!r}", f"{b[name]!r}"
    return f"{key} {a!r}", f"{b!r}"


def rounds(shapes: Sequence[tuple[int, ...]], size: int) -> list[list[int | None]]:
    """For each round the index of the matrix that each of `size` processes takes, or `None`.

    Costs are those of a dense decomposition, `count m n min(m, n)`. The most expensive matrix goes
    to whoever has least so far (Graham's longest processing time: at most 4/3 of the optimum);
    everybody begins with the largest, so the matrices of a round are of similar size.
    """
    costs = [math.prod(shape) * min(shape[-2:]) for shape in shapes]
    taken: list[list[int]] = [[] for _ in range(size)]
    load = [0] * size
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = load.index(min(load))
        taken[rank].append(index)
        load[rank] += costs[index]
    return [list(matrices) for matrices in zip_longest(*taken)]
