"""Nothing is trained: what the model knew before the first task."""

from __future__ import annotations

import torch
from torch import nn

from sculpt.runs.method import Advance, Setting, Strategy
from sculpt.task.cost import Cost
from sculpt.task.targets import Target


class Frozen(Strategy):
    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.model.requires_grad_(False)

    def cost(self, target: Target) -> Cost:
        return Cost(weights=target.parameter.nbytes)

    def steps(self, task: int) -> int:
        return 0

    def begin_task(self, task: int, advance: Advance) -> torch.optim.Optimizer:
        # An optimizer without parameters is refused by torch.
        return torch.optim.AdamW([nn.Parameter(torch.empty(0))])

    def end_task(self, task: int) -> None:
        """Nothing has changed."""
