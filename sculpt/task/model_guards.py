"""A model stays as it is while a task is running: its device, its dtypes, and its modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

    Attributes:
        undo: ends the task with the weights from before it; `None` in a copy, which has none.
    """

    def __init__(
        self, model: nn.Module, parameters: Sequence[Tensor], undo: Callable[[], None] | None
    ) -> None:
        self.model = model
        self.parameters = parameters
        self.undo = undo

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"undo": None}

    def __call__(self, change: Change, recurse: bool = True) -> Any:
        for parameter in self.parameters:
            refuse_to_move(parameter, change)
        return type(self.model)._apply(self.model, change, recurse)  # type: ignore[no-untyped-call]


def hold(model: nn.Module, parameters: Sequence[Tensor], undo: Callable[[], None]) -> None:
    """From now on the model refuses to move its parameters, and knows how to end its task."""
    model.__dict__["_apply"] = Standing(model, parameters, undo)


def release(model: nn.Module) -> None:
    model.__dict__.pop("_apply", None)


def is_held(model: nn.Module) -> bool:
    return isinstance(model.__dict__.get("_apply"), Standing)


def abandon(model: nn.Module) -> None:
    """End the task that is running in `model`; all weights are those from before it, bit by bit.

    For a task whose `Sculptor` is out of reach: after an exception in a Trainer, or in a notebook
    cell that was run again. A `Sculptor` at hand has `undo_task()`.

    Raises:
        RuntimeError: no task is running in the model, or the model is a copy of one with a task.
    """
    found = [module.__dict__["_apply"] for module in model.modules() if is_held(module)]
    if not found:
        raise RuntimeError("no task is running in this model: there is nothing to abandon")
    if any(standing.undo is None for standing in found):
        raise RuntimeError(
            "this model was copied while a task was running, and a copy has no weights from before "
            "it: load its state_dict() into a model without a task"
        )
    for standing in found:
        standing.undo()


class Modules:
    """The modules that a task trains, and the way through the model to each of them.

    Args:
        modules: by their names in `model`.
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        self._model = model
        self._modules = {name: (module, type(module).__name__) for name, module in modules.items()}
        self._find()

    def check(self) -> None:
        """Raises:
        RuntimeError: one of the modules is no longer part of the model.
        """
        if any(children.get(child) is not module for children, child, module in self._links):
            self._find()  # Somebody may have put a wrapper around it.

    def _find(self) -> None:
        """Note each step of each way: children of a module, the name and identity of the next."""
        paths = {id(module): path for path, module in self._model.named_modules()}
        links = {}
        for name, (module, kind) in self._modules.items():
            if id(module) not in paths:
                raise RuntimeError(
                    f"{name!r}, the {kind} that this task trains, was taken out of the model, and "
                    f"{self._instead(name)} is in its place: put it back, and replace modules "
                    "before begin_task() or after end_task()"
                )
            here = self._model
            for child in filter(None, paths[id(module)].split(".")):
                children = here._modules
                here = here.get_submodule(child)
                links[id(children), child] = (children, child, here)
        self._links = list(links.values())

    def _instead(self, name: str) -> str:
        try:
            return f"another {type(self._model.get_submodule(name)).__name__}"
        except AttributeError:
            return "nothing"
