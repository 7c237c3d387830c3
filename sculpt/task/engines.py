"""What engines share: the kind of matrix they make of a target, and the care around a step."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sculpt.certificate.leak import LeakRow
from sculpt.config import SculptConfig
from sculpt.messages import SculptWarning
from sculpt.task.bases import Bases
from sculpt.task.compact import CompactMatrix, follow_together
from sculpt.task.guards import held_by
from sculpt.task.matrix import Matrix
from sculpt.task.originals import Original, recomputes
from sculpt.task.projected import DeltaMatrix, DenseMatrix, Projection
from sculpt.task.targets import LOW_PRECISION, Target
from sculpt_kernels import is_divided


def make_matrix(target: Target, bases: Bases, original: Original, config: SculptConfig) -> Matrix:
    """Give the weight what it needs to train; the module changes from here on."""
    if config.chosen_engine == "compact":
        return CompactMatrix(target, bases, original, recomputes(config, target))
    projection = Projection(bases, config.constraint, config.chosen_engine == "gradient")
    low = target.parameter.dtype in LOW_PRECISION
    return (DeltaMatrix if low else DenseMatrix)(target, original, projection)


def freeze(
    model: nn.Module, targets: Iterable[Target], config: SculptConfig
) -> dict[str, nn.Parameter]:
    """Freeze all but the targets and, with `others="train"`, what trained before: that, by name."""
    chosen = {id(target.parameter) for target in targets}
    others = {}
    for name, parameter in model.named_parameters():
        if config.others != "train" or not parameter.requires_grad:
            parameter.requires_grad_(False)
        elif id(parameter) not in chosen:
            others[name] = parameter
    return others


def groups(matrices: list[Matrix], together: bool) -> list[list[int]]:
    """Indices of matrices that follow in common launches: one layout each.

    One by one otherwise: on a CPU launches cost nothing, and originals that are elsewhere, or bases
    that are gathered, must not all be here at once.
    """
    found: dict[Any, list[int]] = {}
    for index, matrix in enumerate(matrices):
        key: Any = index
        if together and isinstance(matrix, CompactMatrix):
            weight = matrix.weight
            here = not matrix.recompute or matrix.original.is_on(weight.device)
            if here and not is_divided(weight):
                layout = (weight.shape, weight.stride(), weight.dtype, weight.device)
                key = (layout, matrix.trained.shape, matrix.state.U is None, matrix.recompute)
        found.setdefault(key, []).append(index)
    return list(found.values())


def follow_all(matrices: list[Matrix], seeds: Tensor) -> None:
    """Bring every weight up to date with a step, or leave all as they were before it.

    Weights that were rounded at random cannot go back: where another one fails after them, they go
    on with their coordinates.
    """
    done: set[int] = set()
    try:
        reserve(matrices)
        for group in groups(matrices, matrices[0].weight.is_cuda):
            compact = [m for m in (matrices[i] for i in group) if isinstance(m, CompactMatrix)]
            if len(group) > 1:
                follow_together(compact, [seeds[i] for i in group])
            else:
                matrices[group[0]].follow(seeds[group[0]])
            done.update(group)
    except BaseException:
        for index, matrix in enumerate(matrices):
            matrix.undo(index in done)
        raise
    for matrix in matrices:
        matrix.commit()


def reserve(matrices: list[Matrix]) -> None:
    """Fail for want of memory before any weight has moved: ask for the largest workspace."""
    compact = [matrix for matrix in matrices if isinstance(matrix, CompactMatrix)]
    if compact and compact[0].weight.is_cuda:
        largest = max(
            max(matrix.weight.shape[-2:]) * max(matrix.trained.shape[-2:]) for matrix in compact
        )
        # The small product, its two 16-bit parts, and the change of the coordinates.
        torch.empty(4 * largest, device=compact[0].weight.device)


def warn_that_gradients_leak(worst: LeakRow | None = None) -> None:
    """What engine='gradient' has to say at the start of a task, and with its leak at the end."""
    text = (
        "engine='gradient' projects gradients, not updates: AdamW was measured to leave 12 to 22 % "
        "of its update in the protected subspaces; end_task() says how much it was here. "
        "engine='update' and engine='compact' are exact"
    )
    if worst is not None:
        text = (
            f"engine='gradient': {worst.leak:.1%} of the update of {worst.name!r} went into its "
            "protected subspaces in this task"
        )
    warnings.warn(text, SculptWarning, stacklevel=4)


def check_holds(optimizer: torch.optim.Optimizer, matrices: Collection[Matrix]) -> None:
    """Raise `ValueError` where the optimizer does not hold the coordinates of every matrix.

    `TypeError` where it is none of torch, and does not tell when it steps.
    """
    if not hasattr(optimizer, "register_step_pre_hook"):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}. With "
            "DeepSpeed ZeRO-1 or ZeRO-2 attach nothing: call sculptor.update_weights() after each "
            "engine.step()"
        )
    held = set(map(id, held_by(optimizer)))
    missing = [matrix.name for matrix in matrices if id(matrix.trained) not in held]
    if missing:
        raise ValueError(
            f"optimizer holds {len(matrices) - len(missing)} of the {len(matrices)} trainable "
            f"coordinates of this task (first missing: {missing[0]!r}); make it from "
            "sculptor.parameters(), after begin_task(). Where an engine has put them into flat "
            "buffers, as DeepSpeed does, attach nothing: call sculptor.update_weights() after each "
            "engine.step()"
        )
