"""What a run takes: memory beside activations, and bytes on the disk, from shapes and ranks."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from sculpt.runs.config import RunConfig
from sculpt.runs.directory import RunError
from sculpt.runs.method import Strategy

AROUND = 20 * 2**20
"""Bytes of tokenizer, settings and results, more or less."""


@dataclass(frozen=True)
class MemoryUse:
    """Bytes that a method holds beside activations.

    weights: of the model.
    fixed: what stays during a task: weights before it, bases, what earlier tasks use.
    trained: values that train beside the weights, their gradients and the optimizer's moments.
    """

    weights: int
    fixed: int
    trained: int

    @property
    def total(self) -> int:
        return self.weights + self.fixed + self.trained


@dataclass(frozen=True)
class DiskUse:
    """Bytes in the run directory, at most. checkpoints: while it goes on; models: to stay."""

    checkpoints: int
    models: int

    @property
    def total(self) -> int:
        return self.checkpoints + self.models + AROUND


def memory_of(strategy: Strategy) -> MemoryUse:
    """An estimate from shapes and ranks alone."""
    weights = sum(p.numel() * p.element_size() for p in strategy.model.parameters())
    costs = [strategy.cost(target) for target in strategy.targets]
    fixed = strategy.memory_bytes() + sum(cost.fixed for cost in costs)
    return MemoryUse(weights, fixed, sum(cost.moving for cost in costs))


def disk_of(strategy: Strategy, memory: MemoryUse) -> DiskUse:
    """The most that is there at once.

    One checkpoint more than are kept, while it is written. Those of a task share what does not
    change in it, and there may be some of two tasks.
    """
    config = strategy.config
    keep, tasks = config.checkpoint.keep, len(strategy.setting.names)
    models = {"none": 0, "last": 1, "each": tasks + 1}[config.checkpoint.models]
    if keep == 0:
        return DiskUse(0, models * memory.weights)
    fixed = min(2, keep) if strategy.shares_fixed else keep + 1
    checkpoints = (keep + 1) * memory.trained + fixed * memory.fixed
    checkpoints += (2 if strategy.weights_follow() else keep + 1) * memory.weights
    return DiskUse(checkpoints, models * memory.weights)


def space_of(strategy: Strategy) -> tuple[MemoryUse, DiskUse]:
    """Both, of a run by this method."""
    memory = memory_of(strategy)
    return memory, disk_of(strategy, memory)


def free_disk(path: Path) -> int:
    """On the disk where `path` is, or would be."""
    above = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(above).free


def check_disk(disk: DiskUse, config: RunConfig) -> None:
    """Raise `RunError` where the disk of the run directory cannot hold the run.

    What an interrupted run has there already counts as room.
    """
    held = {file.stat().st_ino: file.stat().st_size for file in config.out.rglob("*.safetensors")}
    free = free_disk(config.out) + sum(held.values())
    if free < disk.total:
        raise RunError(
            f"out={config.out}: {free / 1e6:,.0f} MB are free on its disk, and up to "
            f"{disk.total / 1e6:,.0f} MB are needed: {disk.checkpoints / 1e6:,.0f} for checkpoints "
            f"(checkpoint.keep={config.checkpoint.keep}; 1 takes less, 0 none, and then nothing "
            f"can be resumed), {disk.models / 1e6:,.0f} for models "
            f"(checkpoint.models={config.checkpoint.models})"
        )
