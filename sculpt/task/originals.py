"""The weights before a task: where they are kept, and how they come back."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


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
