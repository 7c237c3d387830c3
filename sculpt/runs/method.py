"""What every method of a run is, and how to write one.

`method:` names a class by its import path, and `options:` holds what that class can be told:

    method: last:LastMatrices
    options: {count: 2}

Of a method two things are asked. `begin_task` makes the model trainable and returns an optimizer,
with which the loop of the run trains; `end_task` leaves a plain model. This is a whole method, as
`last.py` in the current folder:

    from sculpt.runs.method import Section, Strategy

    class LastMatrices(Strategy):
        '''Full fine-tuning of the last few matrices that the configuration selects.'''

        class Options(Section):
            count: int = 1

        def begin_task(self, task, advance):
            self.model.requires_grad_(False)
            last = self.targets[-self.options.count :]
            return self.adamw([target.parameter for target in last])

        def end_task(self, task):
            self.model.requires_grad_(False)

Everything else has a default that fits it: data, steps, what a checkpoint holds and how a run goes
on from it, tests, reports. A method that adds to the loss overrides `add_gradients`; one that keeps
something from task to task `memory` and `remember`; one with tensors of its own inside of a task
`save` and `resume_task`. `sculpt.runs.plain` is the one to inherit from for whole matrices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sculpt.certificate.leak import Certificate
from sculpt.data.batching import batches, bucketed_batches
from sculpt.data.config import Section
from sculpt.models.encoding import Encoded
from sculpt.models.learner import Learner
from sculpt.runs.config import RunConfig, TrainingConfig
from sculpt.task.cost import Cost, Matrix, Storage, plain
from sculpt.task.table import TaskRow
from sculpt.task.targets import Target, find_targets

__all__ = ["Advance", "Section", "Setting", "Strategy", "batches_of", "freeze"]

Advance = Callable[[int, int], None]
"""Told how many of how many matrices are done."""


@dataclass(frozen=True)
class Setting:
    """What a method works on.

    rows: the training rows of each task, as tokens; names: of the tasks.
    """

    learner: Learner
    config: RunConfig
    names: Sequence[str]
    rows: Sequence[Sequence[Encoded]]


class Strategy(ABC):
    """A method on one model.

    Options: fields of `options:` with their defaults; none here.
    shares_fixed: checkpoints of a task share what stays in it.
    options: as the run gives them.
    free: parameters that train beside the matrices, such as a new classification head.
    targets: the matrices that the configuration selects.
    """

    Options: ClassVar[type[Section]] = Section
    shares_fixed = True

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.config = setting.config
        self.options: Any = setting.config.options
        if self.config.replay is not None and type(self).batches is not Strategy.batches:
            raise ValueError(
                f"replay is for methods that train on one task after another: "
                f"method={self.config.method!r} makes batches of its own"
            )
        self.model: nn.Module = setting.learner.model
        self.free = setting.learner.free_parameters()
        self.targets = find_targets(self.model, self.config.sculpt).chosen

    @abstractmethod
    def begin_task(self, task: int, advance: Advance) -> torch.optim.Optimizer:
        """Make the model trainable for the task of this number; the optimizer has all that trains.

        Its learning rate is the one before warm-up and schedule.
        """

    @abstractmethod
    def end_task(self, task: int) -> None:
        """Leave a plain model behind."""

    # How it trains.

    def steps(self, task: int) -> int:
        """Optimizer steps of a task."""
        training, replay = self.config.training, self.config.replayed()
        replayed = replay.of_batch(training.batch_size) if replay is not None and task else 0
        return training.steps_for(len(self.setting.rows[task]), replayed)

    def batches(self, task: int, *, skip: int) -> Iterator[list[Encoded]]:
        """Endless batches of a task, without the first `skip`.

        Rows of earlier tasks that are replayed are drawn anew by the seed: no checkpoint has them.
        """
        training, replay = self.config.training, self.config.replayed()
        rows, seed = self.setting.rows, 1000 * self.config.seed + task
        if replay is None:
            return batches_of(rows[task], training, seed, skip=skip)
        for earlier in rows[:task]:
            replay.keep(earlier)

        def order(rows: Sequence[Encoded], size: int, seed: int, skip: int) -> Any:
            return batches_of(rows, training, seed, size=size, skip=skip)

        return replay.batches(rows[task], training.batch_size, skip=skip, order=order)

    def add_gradients(self) -> None:  # noqa: B027 - most methods need none
        """Add those of the method's own loss to those of a batch."""

    def adamw(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW as the run asks for it, on these and what is free, all made trainable."""
        training, trained = self.config.training, [*parameters, *self.free]
        for parameter in trained:
            parameter.requires_grad_(True)
        return torch.optim.AdamW(
            trained,
            lr=training.lr,
            betas=training.betas,
            eps=training.eps,
            weight_decay=training.weight_decay,
            fused=True,
        )

    # What a checkpoint holds of it, beside the optimizer.

    def resume_task(self, task: int, folder: Path) -> torch.optim.Optimizer:
        """Take up a task on a model that has the weights of the moment of `save`, or, where the
        weights follow, those before the task. The state of the optimizer is loaded afterwards."""
        return self.begin_task(task, lambda done, total: None)

    def save(self, folder: Path, previous: Path | None) -> None:  # noqa: B027 - most methods need none
        """Write to the new folder what `resume_task` needs beside the weights as they are now.

        previous: folder of the save before, where there is one.
        """

    def weights_follow(self) -> bool:
        """Whether the weights follow from those before the task and from what `save` writes."""
        return False

    def save_beside(self, folder: Path) -> None:  # noqa: B027 - most methods need none
        """Write to the folder of a plain model what a later run can take up."""

    def plain_state(self) -> Mapping[str, Tensor]:
        """Parameters and buffers by their names in the plain model."""
        return self.model.state_dict()

    def memory(self) -> dict[str, Tensor]:
        """What goes on from task to task beside the weights; it changes in `end_task` only."""
        return {}

    def remember(self, memory: Mapping[str, Tensor]) -> None:  # noqa: B027 - most methods need none
        """Take what `memory` gave."""

    # What is said of it.

    def cost(self, target: Target) -> Cost:
        """What one matrix takes between steps; as full fine-tuning where nothing else is said."""
        return plain(Matrix.of(target), Storage.of(target, self.config.sculpt))

    def held_bytes(self) -> int:
        """Kept beside weights, trained values, their gradients and the optimizer's state."""
        return sum(self.cost(target).fixed for target in self.targets)

    def memory_bytes(self) -> int:
        """How many bytes `memory` takes at most."""
        return 0

    def chosen(self) -> list[TaskRow]:
        """What the task that just began chose for each matrix."""
        return []

    def certify(self, advance: Advance) -> Certificate | None:
        """Measure what moved since `begin_task`; None where nothing was promised."""
        return None


def freeze(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None


def batches_of(
    rows: Sequence[Encoded],
    training: TrainingConfig,
    seed: int,
    *,
    size: int | None = None,
    skip: int = 0,
) -> Iterator[list[Encoded]]:
    """Endless batches of `size` rows (those of a step), every row once before any again.

    They depend on the rows' lengths and the seed alone, so a run that is taken up needs `skip`.
    """
    size = training.batch_size if size is None else size
    if training.order == "shuffled":
        order = batches(len(rows), size, seed, skip=skip)
    else:
        order = bucketed_batches([len(row.ids) for row in rows], size, seed, skip=skip)
    return ([rows[index] for index in batch] for batch in order)
