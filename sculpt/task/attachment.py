"""The optimizer of a task: its steps end with the weights up to date, or change nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from sculpt.distributed.processes import Processes
from sculpt.messages import SculptWarning
from sculpt.task.guards import (
    check_task,
    drop_nonfinite_gradients,
    flag_nonfinite_gradients,
    is_captured,
    refuse_idle_steps,
)


class Attachment:
    """Hooks around the steps of an optimizer.

    Args:
        check: raises where the task cannot go on; called before every step, and told whether a
            CUDA graph records it.
        update: brings the weights up to date.
        skipped: called for each step that is left out; returns how many there were.
        first: called before the first step.
        gradients: called when the first gradients are there.
        task: marks the state of the optimizer as that of this task.
        skip_nonfinite: leave out steps whose gradients are not finite.

    Attributes:
        optimizer: the one that steps.
        steps: how many there were at a rate above zero, those that were left out included.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        check: Callable[[bool], None],
        update: Callable[[], None],
        skipped: Callable[[], int],
        first: Callable[[Optimizer], None],
        gradients: Callable[[], None],
        *,
        task: int,
        skip_nonfinite: bool,
        processes: Processes,
    ) -> None:
        self.optimizer = optimizer
        self.steps = 0
        self._check, self._update, self._skipped, self._first = check, update, skipped, first
        self._gradients = gradients
        self._task = task
        self._skip_nonfinite = skip_nonfinite
        self._processes = processes
        self._stepped = self._looked = self._left_out = self._flagged = False
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_load_state_dict_pre_hook(self._loads),
        ]

    def end(self) -> None:
        """The task is over."""
        for handle in self._handles:
            handle.remove()
        self.optimizer.register_step_pre_hook(refuse_idle_steps)

    def _loads(self, optimizer: Optimizer, state: Any) -> None:
        check_task(state, self._task, loaded=True)

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._check(is_captured(optimizer))
        if not self._stepped:
            self._first(optimizer)
        self._stepped = True
        # A rate on the device is not looked at.
        rates = [group["lr"] for group in optimizer.param_groups if "lr" in group]
        self.steps += not rates or any(isinstance(lr, Tensor) or lr > 0 for lr in rates)
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if closure is None:
            self._left_out = self._drops(optimizer)
            return None
        watched = self._watched(optimizer, closure)
        if "closure" in kwargs:
            return args, kwargs | {"closure": watched}
        return (args[0], watched, *args[2:]), kwargs

    def _watched(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A closure that computes with weights as they are by now, and has finite gradients."""
        self._left_out = False
        evaluations = 0

        def watched() -> Any:
            nonlocal evaluations
            if evaluations:
                self._update()
            loss = closure()
            dropped = self._drops(optimizer)
            # A step that follows any finite gradients moves something.
            self._left_out = dropped and (self._left_out or not evaluations)
            evaluations += 1
            return loss

        return watched

    def _drops(self, optimizer: Optimizer) -> bool:
        """Take gradients away that are not finite; whether that was so."""
        if not self._looked:
            self._looked = True
            self._gradients()
        if not self._skip_nonfinite:
            return False
        if is_captured(optimizer):
            self._flag(optimizer)
            return False
        if not drop_nonfinite_gradients(optimizer, self._processes):
            return False
        count = f"{self._skipped()} so far"
        text = f"a step was left out: its gradients were not finite ({count})"
        warnings.warn(text, SculptWarning, stacklevel=4)
        return True

    def _flag(self, optimizer: Any) -> None:
        """Let the optimizer's own kernels leave out a captured step that is not finite."""
        # A GradScaler has set a flag of its own.
        if self._flagged or not hasattr(optimizer, "found_inf"):
            optimizer.found_inf = flag_nonfinite_gradients(optimizer)
            self._flagged = True

    def _after(self, optimizer: Any, *_: Any) -> None:
        if self._flagged:
            del optimizer.found_inf
            self._flagged = False
        if not self._left_out:
            self._update()
