"""What a run takes: memory beside activations, and room on the disk, from shapes and ranks."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sculpt.engines import recomputes, trained_elements
from sculpt.runs.config import RunConfig
from sculpt.runs.directory import RunError
from sculpt.targets import Target, find_targets

STATES = 2
"""Moments that AdamW holds for each trained value."""

AROUND = 20 * 2**20
"""Bytes of tokenizer, settings and results, more or less."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a method holds beside activations.

    weights: of the model. fixed: weights before the task and bases. trained: values that train
    beside the weights, their gradients and the optimizer's moments.
    """

    weights: int
    fixed: int
    trained: int

    @property
    def total(self) -> int:
        return self.weights + self.fixed + self.trained


@dataclass(frozen=True)
class Disk:
    """Bytes in the run directory, at most. checkpoints: while it goes on; models: to stay."""

    checkpoints: int
    models: int

    @property
    def total(self) -> int:
        return self.checkpoints + self.models + AROUND


def memory_of(targets: list[Target], weights: int, config: RunConfig) -> Memory:
    """An estimate from shapes and ranks alone."""
    if config.method == "plain":
        return Memory(weights, 0, (1 + STATES) * sum(t.parameter.nbytes for t in targets))
    bases = sum(4 * math.prod(t.shape[:-2]) * sum(t.shape[-2:]) * t.trainable_rank for t in targets)
    before = sum(t.parameter.nbytes for t in targets)
    trained = sum(trained_elements(t, config.sculpt) for t in targets)
    return Memory(weights, before + bases, (2 + STATES) * 4 * trained)


def disk_of(targets: list[Target], memory: Memory, config: RunConfig, tasks: int) -> Disk:
    """The most that is there at once.

    One checkpoint more than are kept, while it is written. Those of a task share what does not
    change in it, and there may be some of two tasks.
    """
    keep, sculpt = config.checkpoint.keep, config.sculpt
    models = {"none": 0, "last": 1, "each": tasks + 1}[config.checkpoint.models]
    if keep == 0:
        return Disk(0, models * memory.weights)
    follow = config.method == "sculpt" and sculpt.chosen_engine == "compact"
    follow = follow and sculpt.others == "freeze" and all(recomputes(sculpt, t) for t in targets)
    checkpoints = (keep + 1) * memory.trained + min(2, keep) * memory.fixed
    checkpoints += (2 if follow else keep + 1) * memory.weights
    return Disk(checkpoints, models * memory.weights)


def space_of(model: nn.Module, config: RunConfig, tasks: int) -> tuple[Memory, Disk]:
    """Both, of a run that trains `model` in so many tasks."""
    targets = find_targets(model, config.sculpt).chosen
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    memory = memory_of(targets, weights, config)
    return memory, disk_of(targets, memory, config, tasks)


def free_bytes(path: Path) -> int:
    """On the disk where `path` is, or would be."""
    above = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(above).free


def check_room(disk: Disk, config: RunConfig) -> None:
    """Raise `RunError` where the disk of the run directory cannot hold the run.

    What an interrupted run has there already counts as room.
    """
    held = {file.stat().st_ino: file.stat().st_size for file in config.out.rglob("*.safetensors")}
    free = free_bytes(config.out) + sum(held.values())
    if free < disk.total:
        raise RunError(
            f"out={config.out}: {free / 1e6:,.0f} MB are free on its disk, and up to "
            f"{disk.total / 1e6:,.0f} MB are needed: {disk.checkpoints / 1e6:,.0f} for checkpoints "
            f"(checkpoint.keep={config.checkpoint.keep}; 1 takes less, 0 none, and then nothing "
            f"can be resumed), {disk.models / 1e6:,.0f} for models "
            f"(checkpoint.models={config.checkpoint.models})"
        )
