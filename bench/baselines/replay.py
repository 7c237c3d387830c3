"""Replay: a part of every batch is rows of earlier tasks, from a small memory of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from bench.baselines.rows import drawn
from sculpt.data.config import Count
from sculpt.models.encoding import Encoded
from sculpt.runs.method import Section, Setting, batches_of
from sculpt.runs.plain import Plain


class Replay(Plain):
    """Plain fine-tuning on batches of which `share` is drawn from `rows` rows of each earlier task.

    The memory is drawn anew from the data by the seed, so nothing has to be kept in checkpoints.

    Raises `ValueError` for a share that leaves no row of one kind in a batch.
    """

    class Options(Section):
        """rows: kept of each earlier task. share: of each batch that is drawn from them."""

        rows: Count = 32
        share: Annotated[float, Field(gt=0, lt=1)] = 0.25

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        size = self.config.training.batch_size
        self.old = round(self.options.share * size)
        if not 0 < self.old < size:
            raise ValueError(
                f"options.share={self.options.share:g} of training.batch_size={size} is "
                f"{self.old} rows, expected 1 to {size - 1}"
            )

    def batches(self, task: int, *, skip: int) -> Iterator[list[Encoded]]:
        if task == 0:
            yield from super().batches(task, skip=skip)
        training, seed = self.config.training, 1000 * self.config.seed + task
        size = training.batch_size - self.old
        new = batches_of(self.setting.rows[task], training, seed, size=size, skip=skip)
        old = batches_of(self.remembered(task), training, seed + 500, size=self.old, skip=skip)
        for of_this, of_earlier in zip(new, old, strict=True):
            yield of_this + of_earlier

    def remembered(self, task: int) -> list[Encoded]:
        """The rows of all tasks before this one that are kept."""
        kept: list[Encoded] = []
        for number, rows in enumerate(self.setting.rows[:task]):
            kept += drawn(rows, self.options.rows, f"replay/{self.config.seed}/{number}")
        return kept
