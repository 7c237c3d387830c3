"""The weights before a task: where they are kept, and how they come back."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sculpt.config import SculptConfig
from sculpt.distributed.sharding import local
from sculpt.task.targets import LOW_PRECISION, Target


class Original:
    """A weight as it was before the task: on its device, in host memory, or in a file.

    Args:
        weight: copied; the shard of one that is divided over processes.
        keep: `"device"`, `"cpu"` or `"disk"`.
        directory: where files go.
    """

    def __init__(self, weight: Tensor, keep: str, directory: Path | None = None) -> None:
        self._tensor: Tensor | None = None
        self._path: Path | None = None
        if keep == "disk":
            assert directory is not None
            handle, name = tempfile.mkstemp(dir=directory, suffix=".safetensors")
            os.close(handle)
            self._path = Path(name)
            save_file({"weight": weight.detach().contiguous().cpu()}, self._path)
        elif keep == "cpu" and weight.is_cuda:
            pinned = torch.empty_like(weight, device="cpu", pin_memory=True)
            self._tensor = pinned.copy_(weight.detach())
        else:
            self._tensor = weight.detach().clone(memory_format=torch.preserve_format)

    def is_on(self, device: torch.device) -> bool:
        """Whether `get` costs nothing there."""
        return self._tensor is not None and self._tensor.device == device

    def get(self, device: torch.device) -> Tensor:
        """The weight on `device`, in its own dtype; not to be changed."""
        if self._path is not None:
            weight: Tensor = load_file(self._path, device=str(device))["weight"]
            return weight
        assert self._tensor is not None
        return self._tensor.to(device, non_blocking=True)


def recomputes(config: SculptConfig, target: Target) -> bool:
    """Whether each step rounds the weight afresh from the original, not its change."""
    return target.parameter.dtype not in LOW_PRECISION or config.weight_update == "recompute"


def place_of_original(config: SculptConfig, target: Target) -> str:
    """`"device"` where each step starts from it and nothing else was asked for."""
    if config.originals != "auto":
        return config.originals
    low = target.parameter.dtype in LOW_PRECISION
    if config.chosen_engine == "compact":
        return "device" if recomputes(config, target) else "cpu"
    return "device" if config.chosen_engine == "update" or low else "cpu"


class Originals:
    """The weights before a task, and the files of those that are on disk."""

    def __init__(self, config: SculptConfig) -> None:
        self._config = config
        self._files: tempfile.TemporaryDirectory[str] | None = None

    def keep(self, target: Target, weight: Tensor) -> Original:
        """What `weight` is now; the shard of a divided one."""
        place = place_of_original(self._config, target)
        if place == "disk" and self._files is None:
            self._files = tempfile.TemporaryDirectory(prefix="sculpt-")
        folder = None if self._files is None else Path(self._files.name)
        return Original(local(weight.detach()).to(target.parameter.device), place, folder)

    def close(self) -> None:
        """Remove the files."""
        if self._files is not None:
            self._files.cleanup()
