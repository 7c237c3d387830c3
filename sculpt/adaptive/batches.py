"""Calibration data: what a batch may be, and what is wrong with it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sculpt.distributed.processes import Processes

Function = Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Run:
    """One batch, ready to pass through the model.

    call: passes it, and returns what the model does, or the loss.
    own: it was given as a function of the model: a scalar that it returns is a loss.
    inputs: keyword arguments of the model, where it was given as these.
    """

    call: Function
    own: bool = False
    inputs: Mapping[str, Any] = field(default_factory=dict)


def loss_of(output: Any) -> Tensor | None:
    """The loss that a model or a function returned, alone, first or by name; None without one."""
    loss = getattr(output, "loss", None)
    if loss is None:
        loss = output[0] if isinstance(output, tuple) else output
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


def says_loss(run: Run, output: Any) -> bool:
    """Whether there is one beyond doubt; a scalar of a model may be anything."""
    return loss_of(output) is not None and (run.own or hasattr(output, "loss"))


def runs(calibration: Any, device: torch.device, argument: str = "calibration") -> Iterator[Run]:
    """One function for each batch, which is looked at before it is passed on.

    Args:
        calibration: an iterable of batches. A batch is a mapping of keyword arguments of the model,
            a tensor or a tuple of positional ones, or a function of the model.
        device: where the model computes.
        argument: what errors call it.

    Raises:
        TypeError, ValueError: it is no such iterable, it is empty, or a tensor is on another device
            or not finite.
    """
    if isinstance(calibration, str | bytes | Mapping | Tensor) or not isinstance(
        calibration, Iterable
    ):
        raise TypeError(
            f"{argument} must be an iterable of batches (mappings, tensors, tuples or functions of "
            f"the model); got {type(calibration).__name__}"
        )
    empty = True
    for number, batch in enumerate(calibration):
        _check(batch, f"{argument}[{number}]", device)
        empty = False
        yield _run(batch)
    if empty:
        raise ValueError(f"{argument} is empty; expected at least one batch")


def in_step(
    batches: Iterator[Run], processes: Processes, argument: str = "calibration"
) -> Iterator[Run]:
    """The same, one on every process at a time, as a model needs that gathers divided weights.

    Where one fails the others end without a word, for `Processes.fail_together` to tell them.

    Raises:
        TypeError, ValueError: as `runs`; or, on all, they have not equally many batches.
    """
    for count in itertools.count():
        run: Run | None = None
        error: Exception | None = None
        try:
            run = next(batches, None)
        except (TypeError, ValueError) as problem:
            error = problem
        said = processes.tell("fails" if error else "ends" if run is None else "goes on")
        if error is not None:
            raise error
        if "fails" in said:
            return
        if len(set(said)) > 1:
            raise ValueError(
                f"{argument} has {count} batches on rank {said.index('ends')} and more on rank "
                f"{said.index('goes on')}: a model that fully_shard divided needs equally many"
            )
        if run is None:
            return
        yield run


def _check(batch: Any, name: str, device: torch.device) -> None:
    if isinstance(batch, Mapping):
        for key, value in batch.items():
            _check_value(value, f"{name}[{key!r}]", device)
    elif isinstance(batch, list | tuple):
        for index, value in enumerate(batch):
            _check_value(value, f"{name}[{index}]", device)
    elif isinstance(batch, Tensor):
        _check_value(batch, name, device)
    elif not callable(batch):
        raise TypeError(
            f"{name} must be a mapping, a tensor, a tuple or a function of the model; got "
            f"{type(batch).__name__}"
        )


def _check_value(value: Any, name: str, device: torch.device) -> None:
    if not isinstance(value, Tensor):
        return
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, the model on {device}; move it there")
    if value.numel() == 0:
        raise ValueError(f"{name} is empty, {tuple(value.shape)}")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} has values that are not finite")


def _run(batch: Any) -> Run:
    if isinstance(batch, Mapping):
        return Run(lambda model: model(**batch), inputs=batch)
    if isinstance(batch, list | tuple):
        return Run(lambda model: model(*batch))
    if isinstance(batch, Tensor):
        return Run(lambda model: model(batch))
    return Run(batch, own=True)
