"""How much memory a call takes beyond its arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Peak:
    """Bytes: the most that was allocated at one time, and the largest single allocation."""

    total: int
    largest: int


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
    return Peak(total, max((e.nbytes() for e in events), default=0))
