"""Sculpt as a method of a run, with any of its engines."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from sculpt.adaptive.batches import Function
from sculpt.certificate.leak import Certificate
from sculpt.messages import SculptWarning
from sculpt.runs.method import Advance, Setting, Strategy, batches_of, freeze
from sculpt.sculptor import Sculptor
from sculpt.task.cost import Cost, cost_of
from sculpt.task.originals import recomputes
from sculpt.task.table import TaskRow
from sculpt.task.targets import Target


class Sculpt(Strategy):
    """Moves only in the trailing singular subspaces, chosen anew for every task."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._sculptor = Sculptor(self.model, self.config.sculpt)
        self._chosen: list[TaskRow] = []

    def cost(self, target: Target) -> Cost:
        return cost_of(target, self.config.sculpt)

    def begin_task(self, task: int, advance: Advance) -> torch.optim.Optimizer:
        table = self._sculptor.begin_task(
            self._calibration(task),
            self.setting.names[task],
            progress=lambda done, total, _: advance(done, total),
        )
        self._chosen = table.rows
        return self._optimizer()

    def chosen(self) -> list[TaskRow]:
        return self._chosen

    def _calibration(self, task: int) -> list[Function] | None:
        """Rows of the task before, or of the first one for itself, one by one: no padding."""
        ranks = self.config.sculpt.ranks
        learned = self._sculptor.learned
        if ranks is None or (learned is not None and learned.rooms):
            return None
        rows = self.setting.rows[max(0, task - 1)]
        count = min(self.config.calibration_rows, len(rows))
        drawn = islice(batches_of(rows, self.config.training, self.config.seed, size=1), count)
        learner = self.setting.learner
        return [lambda _, row=row: learner.loss(row)[0] for row in drawn]  # type: ignore[misc]

    def save(self, folder: Path, previous: Path | None) -> None:
        """Bases and coordinates: subspaces are not searched again."""
        self._sculptor.save(folder, previous=previous)

    def memory(self) -> dict[str, Tensor]:
        learned = self._sculptor.learned
        return {} if learned is None else learned.tensors()

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        assert self._sculptor.learned is not None
        self._sculptor.learned.restore(memory, next(self.model.parameters()).device)

    def weights_follow(self) -> bool:
        config = self.config.sculpt
        return (
            config.chosen_engine == "compact"
            and config.others == "freeze"
            and not self.free
            and all(recomputes(config, target) for target in self.targets)
        )

    def resume_task(self, task: int, folder: Path) -> torch.optim.Optimizer:
        self._sculptor = Sculptor.load(self.model, folder)
        return self._optimizer()

    def certify(self, advance: Advance) -> Certificate | None:
        return self._sculptor.verify(
            independent=self.config.certificate == "independent",
            progress=lambda done, total, _: advance(done, total),
        )

    def end_task(self, task: int) -> None:
        self._sculptor.end_task()
        freeze(self.free)
        learned = self._sculptor.learned
        if learned is not None:
            capacity, to_come = learned.capacity(), len(self.setting.names) - task - 1
            if capacity.tasks_left < to_come:
                text = f"room may not last for what is to come ({to_come}): {capacity.forecast()}"
                warnings.warn(text, SculptWarning, stacklevel=2)

    def room(self) -> str:
        learned = self._sculptor.learned
        return "" if learned is None else str(learned.capacity())

    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer = self.adamw(self._sculptor.parameters())
        self._sculptor.attach(optimizer)
        return optimizer
