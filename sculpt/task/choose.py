"""What a task trains: targets with their ranks, and the bases of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from sculpt.adaptive.allocate import adapt
from sculpt.adaptive.importance import Importance
from sculpt.config import SculptConfig
from sculpt.distributed.processes import Processes
from sculpt.task.accumulate import Learned
from sculpt.task.bases import Bases
from sculpt.task.decompose import find_all
from sculpt.task.targets import Target
from sculpt_kernels import Subspace


class Choice(NamedTuple):
    """Targets, their bases, importance by name where it was measured, and full layers."""

    targets: list[Target]
    bases: list[Bases]
    importance: dict[str, Importance]
    full: dict[str, str]


def choose(
    model: nn.Module,
    targets: list[Target],
    config: SculptConfig,
    learned: Learned | None,
    calibration: Any,
    given: Mapping[str, Subspace],
    processes: Processes,
    progress: Callable[[int, int, str], None] | None,
) -> Choice:
    """See `Sculptor.begin_task`; nothing is changed.

    Raises:
        TypeError, ValueError: as there.
    """
    unknown = sorted(set(given) - {target.name for target in targets})
    if unknown:
        raise ValueError(f"subspaces names {unknown[0]!r}, which is no target of this model")
    left = None if learned is None else learned.begin(targets, processes)
    if left is None:
        ranked, importance = adapt(model, targets, config, calibration, processes)
        return Choice(ranked, find_all(ranked, config, given, processes, progress), importance, {})
    if calibration is not None or given:
        raise ValueError(
            "protect='accumulate' keeps ranks and subspaces of the first task: later ones take no "
            "calibration and no subspaces"
        )
    chosen, bases, full = left
    return Choice(chosen, bases, {}, full)
