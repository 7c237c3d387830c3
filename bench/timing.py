"""Timing of variants against each other: interleaved, rotating inputs, medians of many rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median, 20th and 80th percentile of the rounds."""

    median: float
    p20: float
    p80: float
    rounds: int
    # Per round: this variant's seconds over those of the variant it is compared with.
    ratio: float = 1.0


def clock() -> float:
    """Seconds. With one thread on the CPU, those that the processor spent on it, whatever else the
    machine does."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def interleaved(
    sets: Sequence[dict[str, Call]],
    device: torch.device,
    *,
    against: str = "chain",
    rounds: int = 9,
    seconds: float = 2.0,
    batch_seconds: float = 0.01,
) -> dict[str, Timing]:
    """Time each variant in turn, round after round, so that a slow moment hits all alike.

    Args:
        sets: the same variants on several sets of inputs, used in rotation, so that a cache warmed
            by one call does not serve the next.
        against: the variant that ratios refer to: the median over rounds of the ratio within a
            round, which a drifting clock frequency does not move.
        rounds: at least 3; fewer if `seconds` of this variant set are over.
        batch_seconds: calls of a round together take at least this long.
    """
    names = list(sets[0])
    calls = {name: _repeats(sets, name, device, batch_seconds) for name in names}
    spent: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > seconds:
            break
        # A variant must not always follow the same one: back and forth, from another start.
        start_at = done // 2 % len(names)
        order = (names[start_at:] + names[:start_at])[:: -1 if done % 2 else 1]
        for name in order:
            spent[name].append(_once(sets, name, device, calls[name]))
    base = spent.get(against, spent[names[0]])
    return {
        name: Timing(
            statistics.median(values),
            quantile(values, 0.2),
            quantile(values, 0.8),
            len(values),
            statistics.median(a / b for a, b in zip(values, base, strict=True)),
        )
        for name, values in spent.items()
    }


def _repeats(
    sets: Sequence[dict[str, Call]], name: str, device: torch.device, batch_seconds: float
) -> int:
    if device.type == "cuda":
        _once(sets, name, device, len(sets))  # compiles, allocates, warms up
    single = _once(sets, name, device, len(sets))
    return max(1, min(10_000, round(batch_seconds / max(single, 1e-7))))


def _once(sets: Sequence[dict[str, Call]], name: str, device: torch.device, calls: int) -> float:
    """Seconds per call over a batch of calls."""
    functions = [variants[name] for variants in sets]
    count = len(functions)
    if device.type != "cuda":
        start = clock()
        for i in range(calls):
            functions[i % count]()
        return (clock() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    for i in range(calls):
        functions[i % count]()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3 / calls


def captured(sets: Sequence[dict[str, Call]]) -> dict[str, Call]:
    """Each variant as the replay of a CUDA graph, in which it runs once on every set.

    They must have run before, so that nothing is compiled or loaded during the capture.
    """
    replays: dict[str, Call] = {}
    for name in sets[0]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for variants in sets:
                variants[name]()
        replays[name] = graph.replay
    return replays


def ceilings(device: torch.device, *, size: int, elements: int) -> dict[str, float]:
    """Measured rates: copy in B/s (bytes read and written), GEMMs of `size` in FLOP/s."""
    a, b = (torch.randn(elements, device=device) for _ in range(2))
    found = {}

    def best(function: Call) -> float:
        sets = [{"it": function}]
        return interleaved(sets, device, against="it", rounds=7, seconds=1.0)["it"].p20

    found["copy"] = 8 * elements / best(lambda: b.copy_(a))
    kinds = [("float32", torch.float32, False), ("bfloat16", torch.bfloat16, False)]
    if device.type == "cuda":
        kinds += [("tf32", torch.float32, True)]
        kinds += [("float16", torch.float16, False), ("float64", torch.float64, False)]
    for name, dtype, tf32 in kinds:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        x, y = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(x)
        found[name] = 2 * size**3 / best(lambda: torch.mm(x, y, out=out))  # noqa: B023
        torch.backends.cuda.matmul.allow_tf32 = before
    return found
