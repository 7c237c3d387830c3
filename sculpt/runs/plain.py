"""Methods that train whole matrices, or none: plain, frozen, and all tasks at once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from sculpt.models.encoding import Encoded
from sculpt.models.packed_rows import PackedRows
from sculpt.runs.method import (
    Advance,
    Begun,
    Cost,
    Setting,
    Strategy,
    adamw,
    batches_of,
    begun,
    freeze,
)
from sculpt.runs.strategies.budget import describe
from sculpt.task.targets import Target


class Plain(Strategy):
    """Full fine-tuning of the matrices that the configuration selects, everything else frozen."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.weights = [target.parameter for target in self.targets]
        self.model.requires_grad_(False)
        self.budget = describe(self)

    def cost(self, target: Target) -> Cost:
        return Cost.dense(target)

    def begin_task(self, task: int, advance: Advance) -> Begun:
        return begun(self.weights, self.free, self.config)

    def resume_task(self, task: int, folder: Path) -> Begun:
        return begun(self.weights, self.free, self.config)

    def end_task(self, task: int) -> None:
        freeze([*self.weights, *self.free])


class Frozen(Strategy):
    """Nothing is trained: what the model knew before the first task."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.model.requires_grad_(False)
        self.budget = describe(self)

    def cost(self, target: Target) -> Cost:
        return Cost(min(target.shape[-2:]), 0, 0, 0)

    def steps(self, task: int) -> int:
        return 0

    def begin_task(self, task: int, advance: Advance) -> Begun:
        # An optimizer without parameters is refused by torch.
        nothing = nn.Parameter(torch.empty(0))
        return Begun(adamw([nothing], self.config), 0)

    def resume_task(self, task: int, folder: Path) -> Begun:
        return self.begin_task(task, lambda done, total: None)

    def end_task(self, task: int) -> None:
        """Nothing has changed."""


class MultiTask(Plain):
    """All tasks at once, the upper bound of what a sequence can reach.

    Every batch is drawn from the rows of all tasks together. The steps are those of the sequence,
    and no row is seen twice before all were seen once, over all phases; moments and schedule begin
    anew with each phase, as for the other methods.
    """

    def batches(self, task: int, *, skip: int) -> Iterator[list[Encoded]]:
        rows = PackedRows(chain.from_iterable(self.setting.rows))
        before = sum(self.steps(number) for number in range(task))
        seed = 1000 * self.config.seed
        return batches_of(rows, self.config.training, seed, skip=before + skip)
