"""L2-SP (Li et al. 2018): a pull towards the weights before the first task."""

from __future__ import annotations

import torch

from sculpt.data.config import NotNegative
from sculpt.runs.method import Section, Setting
from sculpt.runs.plain import Plain
from sculpt.task.cost import Cost
from sculpt.task.targets import Target


class L2SP(Plain):
    """The loss gains `α/2 ‖w - w⁰‖²`, and `β/2 ‖w‖²` on what is new: a classification head."""

    class Options(Section):
        """strength: `α`, on trained matrices. head_strength: `β`, on a new head."""

        strength: NotNegative = 0.1
        head_strength: NotNegative = 0.01

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        # A run that is taken up begins with the model before the first task, too.
        self._start = [weight.detach().clone() for weight in self.weights]

    def cost(self, target: Target) -> Cost:
        return super().cost(target) + Cost(copies=target.parameter.nbytes)

    @torch.no_grad()
    def add_gradients(self) -> None:
        for weight, start in zip(self.weights, self._start, strict=True):
            if weight.grad is not None:
                weight.grad.add_(weight - start, alpha=self.options.strength)
        for parameter in self.free:
            if parameter.grad is not None:
                parameter.grad.add_(parameter, alpha=self.options.head_strength)
