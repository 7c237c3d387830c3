"""How each task is trained: plain full fine-tuning, or sculpt, on the same matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from sculpt.certificate import Certificate
from sculpt.models.learner import Learner
from sculpt.runs.config import RunConfig
from sculpt.sculptor import Sculptor
from sculpt.targets import find_targets
from sculpt_kernels import Subspace

Advance = Callable[[int, int], None]
"""Told how many of how many matrices are done."""


@dataclass(frozen=True)
class Begun:
    """What a task starts with: its optimizer and the number of values it trains."""

    optimizer: torch.optim.Optimizer
    trainable_elements: int


class Strategy(Protocol):
    """A method: begins and ends tasks on one model; between them the optimizer trains it."""

    def begin_task(self, name: str, advance: Advance) -> Begun:
        """Make the model trainable for one task."""

    def save(self, folder: Path, previous: Path | None) -> None:
        """Write to the new folder what `resume_task` needs beside the weights as they are now.

        previous: folder of the save before, where there is one.
        """

    def resume_task(self, name: str, folder: Path) -> Begun:
        """Take up a task on a model that has the weights of the moment of `save`."""

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
        self._weights = [target.module.weight for target in chosen]
        learner.model.requires_grad_(False)

    def begin_task(self, name: str, advance: Advance) -> Begun:
        return self._begun()

    def save(self, folder: Path, previous: Path | None) -> None:
        """Weights and optimizer are all there is."""

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
        self._sculptor.begin_task(name=name, progress=lambda done, total, _: advance(done, total))
        return self._begun()

    def save(self, folder: Path, previous: Path | None) -> None:
        """Bases and coordinates: subspaces are not searched again."""
        folder.mkdir()
        tensors: dict[str, torch.Tensor] = {}
        for name, matrix in self._sculptor._running().items():
            module = matrix.module
            tensors |= {
                f"{name}:U": module.sculpt_U,
                f"{name}:V": module.sculpt_V,
                f"{name}:C": module.sculpt_C.detach(),
                f"{name}:original": matrix.original,
                f"{name}:weight": module.weight.detach(),
            }
        save_file(tensors, folder / "task.safetensors", {"updates": str(self._sculptor._updates)})

    def resume_task(self, name: str, folder: Path) -> Begun:
        from safetensors import safe_open

        tensors = load_file(folder / "task.safetensors")
        with safe_open(folder / "task.safetensors", "pt") as file:
            updates = int(file.metadata()["updates"])
        subspaces = {}
        for target in find_targets(self._model, self._config.sculpt).chosen:
            key = target.name
            target.module.weight.data.copy_(tensors[f"{key}:original"])
            U, V = tensors[f"{key}:U"], tensors[f"{key}:V"]
            subspaces[key] = Subspace(U, V, target.preserved, "low", 0.0, "saved")
        self._sculptor.begin_task(name=name, subspaces=subspaces)
        for key, matrix in self._sculptor._running().items():
            matrix.module.sculpt_C.data.copy_(tensors[f"{key}:C"])
            matrix.module.weight.data.copy_(tensors[f"{key}:weight"])
            if matrix.folded is not None:
                matrix.folded.copy_(tensors[f"{key}:C"])
        self._sculptor._updates = updates
        return self._begun()

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

    def _begun(self) -> Begun:
        groups = self._sculptor.param_groups(lr=self._config.training.lr)
        if self._free:
            for parameter in self._free:
                parameter.requires_grad_(True)
            groups.append({"params": self._free, "lr": self._config.training.lr})
        optimizer = adamw(groups, self._config)
        self._sculptor.attach(optimizer)
        count = sum(p.numel() for group in groups for p in group["params"])
        return Begun(optimizer, count)


STRATEGIES: dict[str, Callable[[Learner, RunConfig], Strategy]] = {
    "plain": PlainStrategy,
    "sculpt": SculptStrategy,
}
