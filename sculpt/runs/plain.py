"""Methods that train whole matrices: plain fine-tuning, and all tasks at once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch

from sculpt.models.encoding import Encoded, PackedRows
from sculpt.runs.method import Advance, Setting, Strategy, batches_of, freeze


class Plain(Strategy):
    """Full fine-tuning of the matrices that the configuration selects, everything else frozen."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.weights = [target.parameter for target in self.targets]
        self.model.requires_grad_(False)

    def begin_task(self, task: int, advance: Advance) -> torch.optim.Optimizer:
        return self.adamw(self.weights)

    def end_task(self, task: int) -> None:
        freeze([*self.weights, *self.free])


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
