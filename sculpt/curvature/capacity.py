"""How many directions of each layer earlier tasks hardly use, and for how many tasks they last."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Self

from sculpt.config import SculptConfig
from sculpt.curvature.costs import Costs
from sculpt.curvature.memory import Memory
from sculpt.messages import text_table
from sculpt.task.targets import Target


@dataclass(frozen=True)
class LayerCapacity:
    """Of one matrix, `k = min(m, n)`.

    Attributes:
        cheap: the most trailing directions of both sides that hold no more than the limit.
        trains: directions that a task trains.
        tasks: for how many more tasks the cheap ones suffice, if each takes as many as those so
            far did in the mean; infinite where they took none.
    """

    name: str
    k: int
    cheap: int
    trains: int
    tasks: float


@dataclass(frozen=True)
class Capacity:
    """Of all layers that something protected has reached; `str()` is a table and the forecast.

    Attributes:
        limit: share of `tr S tr A` that is cheap.
        protected: names that rows were protected under.
        tasks: for how many more tasks half of the layers have cheap directions.
    """

    limit: float
    protected: tuple[str, ...]
    rows: tuple[LayerCapacity, ...]

    @classmethod
    def of(cls, memory: Memory, targets: list[Target], config: SculptConfig, limit: float) -> Self:
        """Raises `ValueError` where nothing is protected, or the limit is no share."""
        if not 0 < limit < 1:
            raise ValueError(f"limit must be a share in (0, 1); got {limit!r}")
        if not memory:
            raise ValueError("nothing is protected, so that all directions are free")
        rows = []
        for target in targets:
            if memory.of(target.name) is None:
                continue
            k = min(target.shape[-2:])
            cheap = int((Costs.of(memory, target, config, 0.0).shares <= limit).sum())
            each, left = (k - cheap) / len(memory.rows), cheap - target.trainable_rank
            tasks = math.inf if each == 0 else max(0.0, left / each)
            rows.append(LayerCapacity(target.name, k, cheap, target.trainable_rank, tasks))
        return cls(limit, tuple(memory.rows), tuple(rows))

    @property
    def tasks(self) -> float:
        return statistics.median(row.tasks for row in self.rows)

    def __str__(self) -> str:
        lines = [
            [row.name, str(row.k), str(row.cheap), str(row.trains), _tasks(row.tasks)]
            for row in self.rows
        ]
        table = text_table(["matrix", "directions", "cheap", "a task trains", "tasks left"], lines)
        return (
            f"{table}\nAfter {len(self.protected)} protected sets of rows: directions that hold at "
            f"most {self.limit:g} of what they use suffice for {_tasks(self.tasks)} more, in half "
            "of the layers."
        )


def _tasks(value: float) -> str:
    return "any number" if math.isinf(value) else f"{value:.1f}"
