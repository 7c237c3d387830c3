"""Peak memory of this process, and the bytes that an optimizer holds."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_MEMORY = Path("/proc/meminfo")
_CLEAR = Path("/proc/self/clear_refs")


def reset_peak_memory() -> None:
    """Start measuring the peak from now, where the system allows it (Linux)."""
    if _CLEAR.exists():
        try:
            _CLEAR.write_text("5", encoding="ascii")
        except OSError:
            return  # Not permitted here: the peak then counts from the start of the process.


def peak_memory_bytes() -> int:
    """Largest resident memory of this process, its children not counted, in bytes.

    The high-water mark of the current program where the system keeps one: `getrusage` would
    include what the parent held when it started this process.
    """
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="ascii", errors="ignore").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def available_memory_bytes() -> int | None:
    """What this machine can still give, in bytes; None where it does not say."""
    if _MEMORY.exists():
        for line in _MEMORY.read_text(encoding="ascii", errors="ignore").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def free_bytes(device: torch.device) -> int | None:
    """What can still be allocated on a device, in bytes; None where it is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory_bytes() if device.type == "cpu" else None


def optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state, e.g. both moments of AdamW."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
