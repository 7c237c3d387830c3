"""LoRA (Hu et al. 2021), as the `peft` library does it."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import model_validator

from bench.baselines import budget
from bench.baselines.adapter import Adapter
from sculpt.data.config import Count, Positive
from sculpt.runs.method import Section
from sculpt.task import cost
from sculpt.task.cost import Cost, Matrix, Storage
from sculpt.task.targets import Target

RANK = 16
"""Where nothing is said."""


class LoRA(Adapter):
    """`W + s B A` with `B` `(m, r)` zero at first, and `W` frozen."""

    class Options(Section):
        """rank: of every matrix. scaling: `s`, PEFT's lora_alpha / r.

        budget: "match": ranks at which each matrix has as many trained values as by sculpt.
        """

        rank: Count | None = None
        scaling: Positive = 2.0
        budget: Literal["own", "match"] = "own"

        @model_validator(mode="after")
        def _one_rank(self) -> Self:
            if self.budget == "match" and self.rank is not None:
                raise ValueError(
                    f"rank={self.rank} and budget='match', which chooses the rank, exclude each "
                    "other"
                )
            return self

    kinds = ("Linear", "Conv1D")

    def rank(self, target: Target) -> int:
        if self.options.budget == "match":
            return budget.lora_rank(target, self.config.sculpt)
        return min(self.options.rank or RANK, *target.shape)

    def cost(self, target: Target) -> Cost:
        storage = Storage.of(target, self.config.sculpt)
        return cost.lora(Matrix.of(target), storage, self.rank(target))

    def peft_config(self) -> Any:
        import peft

        ranks = self.for_each(self.rank)
        return peft.LoraConfig(
            target_modules=[target.name for target in self.targets],
            rank_pattern=ranks,
            alpha_pattern={name: self.options.scaling * rank for name, rank in ranks.items()},
            fan_in_fan_out=any(target.places[0].transposed for target in self.targets),
            lora_dropout=0.0,
        )
