"""What could break a running task in silence, and the checks that refuse it.

what somebody may do                      refused by                 when
move or convert the model                 HeldModel                  at once
replace a module, or take it out          TrainedModules             before a step, at the end
step an optimizer of another task         OptimizerGuard             before its step
forget to attach the optimizer            layers, OptimizerGuard     next forward, next step
load another task's optimizer state       check_task                 at attach, at the load
step an optimizer after the task          refuse_idle_steps          before its step
compute gradients that are not finite     drop_nonfinite_gradients   in the step, left out
write into weights or coordinates         matrix.Probe, settle       next forward or step
let processes differ                      task.agreement      at the begin, first step

Hooks go with the task but for two: `refuse_idle_steps` stays on the optimizer of a task that ended,
and torch's hook before all steps stays registered once there was a task.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from sculpt.distributed.processes import Processes
from sculpt.distributed.sharding import local
from sculpt_kernels import is_divided

Change = Callable[[Tensor], Tensor]
TASK = "sculpt_task"
"""The key of a parameter group under which the task is noted whose coordinates it holds."""
MAKE_ANOTHER = "make one from sculptor.parameters(), after begin_task(), and attach it"


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


class HeldModel:
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
    model.__dict__["_apply"] = HeldModel(model, parameters, undo)


def release(model: nn.Module) -> None:
    model.__dict__.pop("_apply", None)


def is_held(model: nn.Module) -> bool:
    return isinstance(model.__dict__.get("_apply"), HeldModel)


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
    if any(held.undo is None for held in found):
        raise RuntimeError(
            "this model was copied while a task was running, and a copy has no weights from before "
            "it: load its state_dict() into a model without a task"
        )
    for held in found:
        held.undo()


class TrainedModules:
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


def held_by(optimizer: Optimizer) -> list[Any]:
    """The parameters of all its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def innermost(optimizer: Any) -> Any:
    """The optimizer that steps, where accelerate has wrapped it."""
    while isinstance(optimizer, Optimizer) and isinstance(
        vars(optimizer).get("optimizer"), Optimizer
    ):
        optimizer = vars(optimizer)["optimizer"]
    return optimizer


def mark_task(optimizer: Optimizer, coordinates: Collection[int], task: int) -> None:
    """Note in groups that hold `coordinates`, and so in `state_dict()`, of which task they are."""
    for group in optimizer.param_groups:
        if any(id(parameter) in coordinates for parameter in group["params"]):
            group[TASK] = task


def check_task(state: Mapping[str, Any], task: int, *, loaded: bool) -> None:
    """Raise `ValueError` where the state of an optimizer is that of another task.

    Args:
        state: has `param_groups`, as an optimizer and its `state_dict()` do.
        loaded: groups without a mark are of another task as well.
    """
    marks = {group.get(TASK) for group in state["param_groups"]}
    if marks & {task} or (marks == {None} and not loaded):
        return
    raise ValueError(
        "the optimizer's state is of another task than the one that is running: its moments belong "
        "to other coordinates. Weights and optimizer alone do not bring a running task back, "
        "sculptor.save(path) and Sculptor.load(model, path) do; a new task takes a new optimizer"
    )


def ended_of(parameter: Tensor) -> int | None:
    """The id of the weight whose coordinates these were in a task that is over, or None."""
    found: int | None = getattr(parameter, "sculpt_ended", None)
    return found


class OptimizerGuard:
    """Looks at every optimizer that steps while a task is running.

    It does so as long as somebody holds it.

    Attributes:
        driven: something brings the weights up to date: an attached optimizer, or the caller.
    """

    def __init__(self, matrices: Collection[Any]) -> None:
        # Weak: an optimizer knows its task, which holds this.
        self._attached: ref[Optimizer] | None = None
        self.driven = False
        self._matrices = matrices
        self._weights = {id(matrix.target.parameter): matrix.name for matrix in matrices}
        self._frozen = self._weights.copy()
        for matrix in matrices:
            self._frozen.pop(id(matrix.trained), None)
        _guards.add(self)
        _look_at_all_steps()

    def follow(self, optimizer: Optimizer) -> None:
        """Let this one drive the task."""
        self._attached, self.driven = ref(optimizer), True

    def remove(self) -> None:
        _guards.discard(self)
        self._attached, self._matrices = None, ()

    def refuse_useless(self, optimizer: Optimizer) -> None:
        """Raises:
        RuntimeError: steps of this optimizer train nothing.
        """
        if self._attached is not None and optimizer is self._attached():
            return
        frozen, over = None, False
        for parameter in held_by(optimizer):
            frozen = frozen or self._frozen.get(id(parameter))
            over = over or ended_of(parameter) in self._weights
        # What drives the task may leave steps of others alone that train something else.
        if not (frozen or over) or (self.driven and not is_idle(optimizer)):
            return
        if not self._is_of_task(optimizer):
            what = (
                "coordinates of a task that has ended"
                if over
                else f"the weight of {frozen!r}, which begin_task() froze,"
            )
            raise RuntimeError(
                f"this {type(optimizer).__name__} holds {what} and no coordinates of the task that "
                f"is running, which its steps do not train: {MAKE_ANOTHER}"
            )

    def refuse_unfollowed(self, optimizer: Optimizer) -> None:
        """Raises:
        RuntimeError: a step before this one has moved what no weight has followed.
        """
        if self.driven or not self._is_of_task(optimizer):
            return
        for matrix in self._matrices:
            if matrix.lacks_a_step():
                raise RuntimeError(not_followed(matrix.name))

    def _is_of_task(self, optimizer: Optimizer) -> bool:
        running = {id(matrix.trained) for matrix in self._matrices}
        return not running.isdisjoint(map(id, held_by(optimizer)))


def not_followed(name: str) -> str:
    """What to do about a step that no weight has followed."""
    return (
        f"{name!r} was changed by a step, or by hand, and its weight has not followed: the change "
        "would be lost. Call sculptor.attach(optimizer) before the first step, or "
        "sculptor.update_weights() after changing coordinates by hand"
    )


_guards: WeakSet[OptimizerGuard] = WeakSet()


@cache
def _look_at_all_steps() -> None:
    """Once and for ever: a hook that went with a forgotten task could go in the midst of a step."""
    register_optimizer_step_pre_hook(_before)


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for guard in list(_guards):
        guard.refuse_useless(optimizer)
        guard.refuse_unfollowed(optimizer)


def refuse_idle_steps(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """A hook for an optimizer whose task has ended."""
    if is_idle(optimizer) and any(ended_of(p) is not None for p in held_by(optimizer)):
        raise RuntimeError(
            f"the task whose coordinates this {type(optimizer).__name__} holds has ended, and its "
            f"steps train nothing: {MAKE_ANOTHER}"
        )


def is_idle(optimizer: Optimizer) -> bool:
    """Whether nothing that it holds has a gradient."""
    return all(parameter.grad is None for parameter in held_by(optimizer))


def drop_nonfinite_gradients(optimizer: Optimizer, processes: Processes) -> bool:
    """Take all gradients away where one is not finite: nothing is changed by a step without them.

    Returns:
        Whether that was so, on any process.
    """
    held = held_by(optimizer)
    grads = [local(p.grad) for p in held if p.grad is not None]
    grads = [grad for grad in grads if grad.numel()]
    bad = bool(grads) and not bool(torch.isfinite(_largest(grads)))
    if any(is_divided(p) for p in held):
        bad = processes.any(bad)
    if bad:
        for parameter in held:
            parameter.grad = None
    return bad


def is_captured(optimizer: Optimizer) -> bool:
    """Whether a CUDA graph records this step: the host must not look at values then."""
    grads = (p.grad for p in held_by(optimizer))
    on_cuda = any(grad is not None and grad.is_cuda for grad in grads)
    return on_cuda and torch.cuda.is_current_stream_capturing()


def flag_nonfinite_gradients(optimizer: Optimizer) -> Tensor | None:
    """What a fused optimizer takes as `found_inf`: 1 where a gradient is not finite, else 0.

    Its kernels then change nothing, and no value goes to the host. `None` for optimizers that
    take no such flag, and for gradients that are divided over processes, which would not agree.
    """
    held = held_by(optimizer)
    grads = [p.grad for p in held if p.grad is not None and p.grad.numel()]
    takes = getattr(optimizer, "_step_supports_amp_scaling", False)
    if not takes or not grads or any(is_divided(p) for p in held):
        return None
    return (~torch.isfinite(_largest(grads))).float()


def _largest(grads: list[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(grads, norm_type=float("inf"))
