"""How each task is trained: plain full fine-tuning, or sculpt, on the same matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from sculpt.certificate import Certificate
from sculpt.models.learner import Learner
from sculpt.runs.config import RunConfig
from sculpt.sculptor import Sculptor
from sculpt.targets import find_targets
from sculpt.task import TaskRow

Advance = Callable[[int, int], None]
"""Told how many of how many matrices are done."""


@dataclass(frozen=True)
class Begun:
    """What a task starts with: its optimizer, the number of values it trains, and what was chosen
    for each matrix."""

    optimizer: torch.optim.Optimizer
    trainable_elements: int
    subspaces: list[TaskRow] = field(default_factory=list)


class Strategy(Protocol):
    """A method: begins and ends tasks on one model; between them the optimizer trains it."""

    def begin_task(self, name: str, advance: Advance) -> Begun:
        """Make the model trainable for one task."""

    def save(self, folder: Path, previous: Path | None) -> None:
        """Write to the new folder what `resume_task` needs beside the weights as they are now.

        previous: folder of the save before, where there is one.
        """

    def weights_follow(self) -> bool:
        """Whether the weights follow from those before the task and from what `save` writes."""

    def resume_task(self, name: str, folder: Path) -> Begun:
        """Take up a task on a model that has the weights of the moment of `save`, or, where the
        weights follow, those before the task."""

    def certify(self, advance: Advance) -> Certificate | None:
        """Measure what moved since `begin_task`; None where nothing was promised."""

    def end_task(self) -> None:
        """Leave a plain model behind."""


class PlainStrategy:
    """Full fine-tuning of the matrices that the configuration selects, everything else frozen."""

    def __init__(self, learner: Learner, config: RunConfig) -> None:
        self._config = config
        self._free = learner.free_parameters()
        chosen = find_targets(learner.model, config.sculpt).chosen
        self._weights = [target.parameter for target in chosen]
        learner.model.requires_grad_(False)

    def begin_task(self, name: str, advance: Advance) -> Begun:
        return self._begun()

    def save(self, folder: Path, previous: Path | None) -> None:
        """Weights and optimizer are all there is."""

    def weights_follow(self) -> bool:
        return False

    def resume_task(self, name: str, folder: Path) -> Begun:
        return self._begun()

    def certify(self, advance: Advance) -> Certificate | None:
        return None

    def end_task(self) -> None:
        for weight in (*self._weights, *self._free):
            weight.requires_grad_(False)
            weight.grad = None

    def _begun(self) -> Begun:
        trained = [*self._weights, *self._free]
        for weight in trained:
            weight.requires_grad_(True)
        groups = [{"params": trained, "lr": self._config.training.lr}]
        return Begun(adamw(groups, self._config), sum(weight.numel() for weight in trained))


def adamw(groups: list[dict[str, Any]], config: RunConfig) -> torch.optim.Optimizer:
    """AdamW as the run asks for it, over groups with their own rates."""
    training = config.training
    return torch.optim.AdamW(
        groups,
        betas=training.betas,
        eps=training.eps,
        weight_decay=training.weight_decay,
        fused=True,
    )


class SculptStrategy:
    """Coordinates of the trailing singular subspaces, chosen anew for every task."""

    def __init__(self, learner: Learner, config: RunConfig) -> None:
        self._config = config
        self._model = learner.model
        self._free = learner.free_parameters()
        self._sculptor = Sculptor(learner.model, config.sculpt)

    def begin_task(self, name: str, advance: Advance) -> Begun:
        table = self._sculptor.begin_task(
            name=name, progress=lambda done, total, _: advance(done, total)
        )
        return self._begun(table.rows)

    def save(self, folder: Path, previous: Path | None) -> None:
        """Bases and coordinates: subspaces are not searched again."""
        self._sculptor.save(folder, previous=previous)

    def weights_follow(self) -> bool:
        frozen = self._config.sculpt.others == "freeze" and not self._free
        return frozen and self._sculptor.weights_follow

    def resume_task(self, name: str, folder: Path) -> Begun:
        self._sculptor = Sculptor.load(self._model, folder)
        return self._begun([])

    def certify(self, advance: Advance) -> Certificate | None:
        return self._sculptor.verify(
            independent=self._config.certificate == "independent",
            progress=lambda done, total, _: advance(done, total),
        )

    def end_task(self) -> None:
        self._sculptor.end_task()
        for parameter in self._free:
            parameter.requires_grad_(False)
            parameter.grad = None

    def _begun(self, subspaces: list[TaskRow]) -> Begun:
        groups = self._sculptor.param_groups(lr=self._config.training.lr)
        if self._free:
            for parameter in self._free:
                parameter.requires_grad_(True)
            groups.append({"params": self._free, "lr": self._config.training.lr})
        optimizer = adamw(groups, self._config)
        self._sculptor.attach(optimizer)
        count = sum(p.numel() for group in groups for p in group["params"])
        return Begun(optimizer, count, subspaces)


STRATEGIES: dict[str, Callable[[Learner, RunConfig], Strategy]] = {
    "plain": PlainStrategy,
    "sculpt": SculptStrategy,
}
