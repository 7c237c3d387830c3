"""What a task trains: targets with their ranks, and the bases of each.

In several processes each finds the bases of some targets and sends them to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sculpt.adaptive.allocate import adapt
from sculpt.adaptive.importance import Importance
from sculpt.config import SculptConfig
from sculpt.curvature.collect import collect
from sculpt.curvature.directions import Directions
from sculpt.curvature.memory import Memory
from sculpt.distributed.processes import Processes, rounds
from sculpt.distributed.sharding import like_shards, whole
from sculpt.task.bases import Bases, find_bases, splitter
from sculpt.task.targets import Target
from sculpt_kernels import Subspace


class TaskBases(NamedTuple):
    """Targets, their bases, and importance by name where it was measured."""

    targets: list[Target]
    bases: list[Bases]
    importance: dict[str, Importance]


def choose(
    model: nn.Module,
    targets: list[Target],
    config: SculptConfig,
    memory: Memory,
    calibration: Any,
    given: Mapping[str, Subspace],
    processes: Processes,
    progress: Callable[[int, int, str], None] | None,
) -> TaskBases:
    """See `Sculptor.begin_task`; nothing is changed.

    Raises:
        TypeError, ValueError: as there.
    """
    unknown = sorted(set(given) - {target.name for target in targets})
    if unknown:
        raise ValueError(f"subspaces names {unknown[0]!r}, which is no target of this model")
    curved = config.subspaces != "weights" and bool(memory) and not given
    if config.subspaces == "curvature" and not curved:
        raise ValueError(
            "subspaces='curvature' needs something to protect, and finds its subspaces itself: "
            "call protect(batches) or load_memory(path) before begin_task(), without subspaces"
        )
    memory.check(targets)
    new = None
    # Other engines preserve what earlier tasks use most, whatever the new one uses.
    if curved and calibration is not None and config.chosen_engine == "compact":
        calibration = list(calibration) if isinstance(calibration, Iterator) else calibration
        new = collect(
            model, targets, calibration, memory, config, processes, argument="calibration"
        )
    if config.ranks is None and (curved or config.subspaces == "auto"):
        calibration = None  # Used, or for directions that there is nothing yet to compare with.
    ranked, importance = adapt(
        model, targets, config, calibration, processes, memory if curved else Memory()
    )
    directions = Directions(memory, new) if curved else None
    bases = find_all(ranked, config, given, directions, processes, progress)
    return TaskBases(ranked, bases, importance)


PARTS = ("U", "V", "removed")


def find_all(
    targets: list[Target],
    config: SculptConfig,
    given: Mapping[str, Subspace],
    directions: Directions | None,
    processes: Processes,
    progress: Callable[[int, int, str], None] | None,
) -> list[Bases]:
    """Bases of every target, in their order, the same bits however many processes there are.

    In a round each process decomposes one whole matrix, then all exchange what they found: no
    process ever holds more than one whole matrix and one result beside what it keeps.

    Raises:
        TypeError, ValueError: a weight is not finite, or `given` does not fit. Other processes than
            the one that found out raise RuntimeError.
    """
    split = splitter(config)
    found: dict[int, Bases] = {}
    for indices in rounds([target.shape for target in targets], processes.size):
        mine = indices[processes.rank]
        weight = _own(targets, indices, processes.rank)
        bases: Bases | None = None
        error: Exception | None = None
        if mine is not None:
            target = targets[mine]
            try:
                bases = find_bases(
                    target, config, split, given.get(target.name), weight, directions
                )
            except (TypeError, ValueError) as problem:
                error = problem
        processes.fail_together(error)
        heads = processes.tell(None if bases is None else _describe(bases))
        for owner, index in enumerate(indices):
            if index is None:
                continue
            own = bases if owner == processes.rank else None
            received = _receive(own, heads[owner], owner, processes)
            found[index] = divide(targets[index], received)
            if progress is not None:
                progress(len(found), len(targets), targets[index].name)
    return [found[index] for index in range(len(targets))]


def _own(targets: list[Target], indices: list[int | None], rank: int) -> Tensor | None:
    """The whole weight of this process, where weights are divided; each passes by in turn."""
    own = None
    for owner, index in enumerate(indices):
        if index is not None:
            passing = whole(targets[index].parameter.detach())
            own = passing if owner == rank else own
    return own


def divide(target: Target, bases: Bases) -> Bases:
    """Bases of which every process keeps some rows, where it keeps a part of the weight."""
    weight = target.oriented(target.parameter.detach())
    U, V, removed = (
        None if part is None else like_shards(weight, part, stack=weight.ndim == 3)
        for part in (bases.U, bases.V, bases.removed)
    )
    return replace(bases, U=U, V=V, removed=removed)


def _describe(bases: Bases) -> dict[str, Any]:
    """What JSON holds of bases: enough to make room for them."""
    parts = {name: part for name in PARTS if (part := getattr(bases, name)) is not None}
    return {
        "shapes": {name: list(part.shape) for name, part in parts.items()},
        "dtype": str(next(iter(parts.values())).dtype),
        "about": [bases.complement, bases.energy, bases.method, bases.gain],
    }


def _receive(bases: Bases | None, head: dict[str, Any], owner: int, processes: Processes) -> Bases:
    """The bases of `owner`, which has them already."""
    dtype = getattr(torch, head["dtype"].removeprefix("torch."))
    parts: dict[str, Tensor | None] = dict.fromkeys(PARTS)
    for name, shape in head["shapes"].items():
        if bases is None:
            part = torch.empty(shape, dtype=dtype, device=processes.device)
        else:
            part = getattr(bases, name)
        processes.broadcast(part, owner)
        parts[name] = part
    return Bases(parts["U"], parts["V"], parts["removed"], *head["about"])
