"""Optimizers that belong to no task any more, or to none yet: their steps would train nothing."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any
from weakref import WeakSet, ref

from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from sculpt.task.layers import ended_of
from sculpt.task.matrix import Matrix
from sculpt.task.optimizers import held_by

MAKE_ANOTHER = "make one from sculptor.parameters(), after begin_task(), and attach it"


class Watch:
    """Looks at every optimizer that steps while a task is running.

    It does so as long as somebody holds it.

    Attributes:
        driven: something brings the weights up to date: an attached optimizer, or the caller.
    """

    def __init__(self, matrices: Collection[Matrix]) -> None:
        # Weak: an optimizer knows its task, which holds this.
        self._attached: ref[Optimizer] | None = None
        self.driven = False
        self._matrices = matrices
        self._weights = {id(matrix.target.parameter): matrix.name for matrix in matrices}
        self._frozen = self._weights.copy()
        for matrix in matrices:
            self._frozen.pop(id(matrix.trained), None)
        _watches.add(self)
        _look_at_all_steps()

    def follow(self, optimizer: Optimizer) -> None:
        """Let this one drive the task."""
        self._attached, self.driven = ref(optimizer), True

    def remove(self) -> None:
        _watches.discard(self)
        self._attached, self._matrices = None, ()

    def refuse_stray(self, optimizer: Optimizer) -> None:
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


_watches: WeakSet[Watch] = WeakSet()


@cache
def _look_at_all_steps() -> None:
    """Once and for ever: a hook that went with a forgotten task could go in the midst of a step."""
    register_optimizer_step_pre_hook(_before)


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for watch in list(_watches):
        watch.refuse_stray(optimizer)
        watch.refuse_unfollowed(optimizer)


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
