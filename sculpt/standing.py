"""A model stays where it is, and in its dtypes, while a task is running."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from sculpt.distributed.sharding import local

Change = Callable[[Tensor], Tensor]


def refuse_to_move(parameter: Tensor, change: Change) -> None:
    """Raise `RuntimeError` where `change` gives another device or dtype to a parameter."""
    was = local(parameter.detach()).new_empty(0)
    now = change(was)
    if (now.dtype, now.device) != (was.dtype, was.device):
        raise RuntimeError(
            f"a model cannot go from {was.dtype} on {was.device} to {now.dtype} on "
            f"{now.device} while a task is running: optimizer, bases and original weights "
            "would stay behind. Move it before begin_task() or after end_task()"
        )


class Standing:
    """Takes the place of a model's `_apply`, which `to`, `half`, `cuda` and the like go through.

    It refuses before anything has moved. A copy of the model gets one of the copy's parameters.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor]) -> None:
        self.model = model
        self.parameters = parameters

    def __call__(self, change: Change, recurse: bool = True) -> Any:
        for parameter in self.parameters:
            refuse_to_move(parameter, change)
        return type(self.model)._apply(self.model, change, recurse)  # type: ignore[no-untyped-call]


def hold(model: nn.Module, parameters: Sequence[Tensor]) -> None:
    """From now on the model refuses to move its parameters."""
    model.__dict__["_apply"] = Standing(model, parameters)


def release(model: nn.Module) -> None:
    model.__dict__.pop("_apply", None)


def is_held(model: nn.Module) -> bool:
    return isinstance(model.__dict__.get("_apply"), Standing)
