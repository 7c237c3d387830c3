"""Sculpt as a method of a run, with any of its engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from sculpt.certificate.leak import Certificate
from sculpt.curvature.collect import bytes_of_all
from sculpt.curvature.memory import Memory
from sculpt.models.encoding import Encoded
from sculpt.models.learner import Learner
from sculpt.runs.method import Advance, Setting, Strategy, batches_of, freeze
from sculpt.sculptor import Sculptor
from sculpt.task.cost import Cost, cost_of
from sculpt.task.originals import recomputes
from sculpt.task.table import TaskRow
from sculpt.task.targets import Target


@dataclass(frozen=True)
class Summed:
    """The summed loss of some rows, as a function of the model; `len` is their number."""

    learner: Learner
    rows: Sequence[Encoded]

    def __call__(self, model: nn.Module) -> Tensor:
        return self.learner.loss(self.rows)[0] * sum(row.learned for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)


class Sculpt(Strategy):
    """Moves only in subspaces that earlier tasks do not need, chosen anew for every task."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._sculptor = Sculptor(self.model, self.config.sculpt)
        self._chosen: list[TaskRow] = []
        self._in_task = False
        if self.config.memory is not None:
            self._sculptor.load_memory(self.config.memory)

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

    def _calibration(self, task: int) -> list[Summed] | None:
        """Rows of this task; of the one before (the first: its own) for ranks that adapt to data
        where nothing is protected."""
        if self._sculptor.memory:
            return self._rows(task)
        if self.config.sculpt.ranks is not None:
            return self._rows(max(0, task - 1), size=1)
        return None

    def _rows(self, task: int, size: int | None = None) -> list[Summed]:
        rows, training = self.setting.rows[task], self.config.training
        size = training.batch_size if size is None else size
        count = min(self.config.calibration_rows, len(rows)) // size or 1
        drawn = islice(batches_of(rows, training, self.config.seed, size=size), count)
        return [Summed(self.setting.learner, batch) for batch in drawn]

    def save(self, folder: Path, previous: Path | None) -> None:
        """Bases and coordinates: subspaces are not searched again."""
        self._sculptor.save(folder, previous=previous)

    def memory(self) -> dict[str, Tensor]:
        """Inside of a task `save` writes it."""
        return {} if self._in_task else self._sculptor.memory.tensors()

    def held_bytes(self) -> int:
        factors = self._sculptor.memory.factors.values()
        sums = sum(t.nbytes for factor in factors for t in factor.tensors().values())
        return super().held_bytes() + sums

    def memory_bytes(self) -> int:
        config = self.config.sculpt
        if config.subspaces == "weights":
            return 0
        return bytes_of_all(self.targets, config, next(self.model.parameters()).device)

    def save_beside(self, folder: Path) -> None:
        if self.config.checkpoint.memory and self._sculptor.memory:
            self._sculptor.save_memory(folder)

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        device = next(self.model.parameters()).device
        self._sculptor.memory = Memory.from_tensors(memory, device)

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
        last = task + 1 == len(self.setting.names)
        used = self.config.checkpoint.memory or not last
        protects = used and self.config.sculpt.subspaces != "weights"
        self._sculptor.end_task(self._rows(task) if protects else None)
        self._in_task = False
        freeze(self.free)

    def _optimizer(self) -> torch.optim.Optimizer:
        self._in_task = True
        optimizer = self.adamw(self._sculptor.parameters())
        self._sculptor.attach(optimizer)
        return optimizer
