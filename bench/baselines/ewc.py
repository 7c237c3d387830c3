"""EWC (Kirkpatrick et al. 2017): what earlier tasks are sensitive to is pulled back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sculpt.data.config import Count, NotNegative
from sculpt.data.replay import drawn
from sculpt.runs.method import Section, Setting
from sculpt.runs.plain import Plain
from sculpt.task.cost import Cost
from sculpt.task.targets import Target


class EWC(Plain):
    """The loss gains `λ/2 Σ_t F_t (w - w_t)²`.

    `F_t` is the diagonal of the empirical Fisher matrix of task `t` at its end `w_t`: the mean over
    rows of the squared gradient of the log-likelihood of the row's answer. The sum over tasks is a
    single square around the mean of the `w_t` that `F_t` weighs, plus what is constant, so two
    tensors for each matrix hold any number of tasks.
    """

    class Options(Section):
        """strength: `λ`; the default was the best of six on a small encoder, see bench/README.md.

        rows: of each task, for the mean that is its Fisher.
        """

        strength: NotNegative = 1e5
        rows: Count = 64

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.trained = [*self.weights, *self.free]
        self._fisher: list[Tensor] = []
        self._center: list[Tensor] = []

    def cost(self, target: Target) -> Cost:
        return super().cost(target) + Cost(copies=2 * 4 * target.parameter.numel())

    @torch.no_grad()
    def add_gradients(self) -> None:
        for weight, fisher, center in zip(self.trained, self._fisher, self._center, strict=False):
            if weight.grad is not None:
                pull = fisher * (weight - center)
                weight.grad.add_(pull.to(weight.dtype), alpha=self.options.strength)

    def end_task(self, task: int) -> None:
        self._consolidate(self.fisher(task))
        super().end_task(task)

    def fisher(self, task: int) -> list[Tensor]:
        """Of all that trains, float32, on `rows` rows of the task, drawn by the seed."""
        rows = drawn(
            self.setting.rows[task], self.options.rows, f"fisher/{self.config.seed}/{task}"
        )
        found = [torch.zeros_like(weight, dtype=torch.float32) for weight in self.trained]
        for row in rows:
            loss, _ = self.setting.learner.loss([row])
            # The loss is a mean over the tokens of the answer, the log-likelihood a sum.
            gradients = torch.autograd.grad(loss * row.learned, self.trained, allow_unused=True)
            for total, gradient in zip(found, gradients, strict=True):
                if gradient is not None:
                    total.addcmul_(gradient.float(), gradient.float(), value=1 / len(rows))
        return found

    @torch.no_grad()
    def _consolidate(self, fisher: list[Tensor]) -> None:
        if not self._fisher:
            self._fisher = fisher
            self._center = [weight.detach().float().clone() for weight in self.trained]
            return
        for total, center, more, weight in zip(
            self._fisher, self._center, fisher, self.trained, strict=True
        ):
            total.add_(more)
            share = torch.where(total > 0, more / total, 0.0)
            center.add_(share * (weight.float() - center))

    def memory(self) -> dict[str, Tensor]:
        kinds = {"fisher": self._fisher, "center": self._center}
        return {
            f"{kind}.{place}": value
            for kind, values in kinds.items()
            for place, value in enumerate(values)
        }

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        if memory:
            device, places = self.weights[0].device, range(len(self.trained))
            self._fisher = [memory[f"fisher.{place}"].to(device) for place in places]
            self._center = [memory[f"center.{place}"].to(device) for place in places]
