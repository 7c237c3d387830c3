"""How much memory a call takes beyond its arguments, and what tensors hold."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Peak:
    """Bytes: the most that was allocated at one time, the largest allocation, what is left."""

    total: int
    largest: int
    left: int


def peak(function: Callable[[], object]) -> Peak:
    """What one call on the CPU allocates, temporaries inside torch's operators included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    result = recorded.profiler
    assert result is not None
    events = [e for e in result.kineto_results.events() if e.name() == "[memory]"]
    live = total = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        total = max(total, live)
    return Peak(total, max((e.nbytes() for e in events), default=0), live)


def tensor_bytes() -> int:
    """All tensors that there are, each storage once; those inside of wrappers are found too."""
    gc.collect()
    found = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    storages = (t.untyped_storage() for t in found if t.device.type == "cpu")
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def give_back_freed_memory() -> None:
    """What the C library keeps of freed tensors would count for steps that do not use it."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
