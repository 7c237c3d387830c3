"""OSF, as the `peft` library does it: trailing singular triplets train, in projected gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from bench.baselines import budget
from bench.baselines.adapter import Adapter
from sculpt.runs.method import Section
from sculpt.task import cost
from sculpt.task.cost import Cost, Matrix, Storage
from sculpt.task.targets import Target


class OSF(Adapter):
    """The trainable rank of a matrix is that of sculpt.

    The adapter's tensors are saved, but `peft` decomposes every weight again on the way.
    """

    class Options(Section):
        """budget: "match": ranks at which each matrix has as many trained values as by sculpt."""

        budget: Literal["own", "match"] = "own"

    def rank(self, target: Target) -> int:
        if self.options.budget == "match":
            return budget.osf_rank(target, self.config.sculpt)
        return target.trainable_rank

    def cost(self, target: Target) -> Cost:
        matrix = replace(Matrix.of(target), trainable_rank=self.rank(target))
        return cost.osf(matrix, Storage.of(target, self.config.sculpt))

    def peft_config(self) -> Any:
        import peft

        return peft.OSFConfig(
            target_modules=[target.name for target in self.targets],
            rank_pattern=self.for_each(lambda target: min(target.shape) - self.rank(target)),
        )
