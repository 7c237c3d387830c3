"""How each task is trained: plain full fine-tuning, or sculpt, on the same matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from sculpt.certificate import Certificate
from sculpt.config import SculptConfig
from sculpt.sculptor import Sculptor
from sculpt.targets import find_targets

Advance = Callable[[int, int], None]
"""Told how many of how many matrices are done."""


@dataclass(frozen=True)
class Begun:
    """What a task starts with: its optimizer and the number of values it trains."""

    optimizer: torch.optim.Optimizer
    trainable_elements: int


class Strategy(Protocol):
    """Begins and ends tasks on one model; between them the optimizer trains it."""

    @property
    def name(self) -> str: ...

    def begin_task(self, name: str, lr: float, advance: Advance) -> Begun:
        """Make the model trainable for one task at learning rate `lr` of a dense AdamW."""

    def certify(self, advance: Advance) -> Certificate | None:
        """Measure what moved since `begin_task`; None where nothing was promised."""

    def end_task(self) -> None:
        """Leave a plain model behind."""


class PlainStrategy:
    """Full fine-tuning of the matrices that `config` selects, everything else frozen."""

    name = "plain"

    def __init__(self, model: torch.nn.Module, config: SculptConfig) -> None:
        self._weights = [target.module.weight for target in find_targets(model, config).chosen]
        model.requires_grad_(False)

    def begin_task(self, name: str, lr: float, advance: Advance) -> Begun:
        for weight in self._weights:
            weight.requires_grad_(True)
        optimizer = torch.optim.AdamW(self._weights, lr=lr, weight_decay=0.0, fused=True)
        return Begun(optimizer, sum(weight.numel() for weight in self._weights))

    def certify(self, advance: Advance) -> Certificate | None:
        return None

    def end_task(self) -> None:
        for weight in self._weights:
            weight.requires_grad_(False)
            weight.grad = None


class SculptStrategy:
    """Coordinates of the trailing singular subspaces, chosen anew for every task."""

    name = "sculpt"

    def __init__(self, model: torch.nn.Module, config: SculptConfig) -> None:
        self._sculptor = Sculptor(model, config)

    def begin_task(self, name: str, lr: float, advance: Advance) -> Begun:
        table = self._sculptor.begin_task(
            name=name, progress=lambda done, total, _: advance(done, total)
        )
        groups = self._sculptor.param_groups(lr=lr)
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        self._sculptor.attach(optimizer)
        return Begun(optimizer, table.trainable_elements)

    def certify(self, advance: Advance) -> Certificate | None:
        return self._sculptor.verify(
            independent=True, progress=lambda done, total, _: advance(done, total)
        )

    def end_task(self) -> None:
        self._sculptor.end_task()


STRATEGIES: dict[str, Callable[[torch.nn.Module, SculptConfig], Strategy]] = {
    "plain": PlainStrategy,
    "sculpt": SculptStrategy,
}
