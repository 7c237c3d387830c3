"""One weight during a task: what trains, how the weight follows, what it was, and how it ends.

All kinds see the weight as `(..., out, in)`: see `sculpt.task.compact` and `sculpt.task.projected`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from sculpt.distributed.sharding import as_shard, local, whole
from sculpt.task.bases import Bases
from sculpt.task.originals import Original
from sculpt.task.targets import Target

AVERAGED = 128
"""Roundings that an average of weights may have gathered."""
Side = tuple[Tensor, bool]
"""A basis, and whether it spans what is protected (else what is free)."""


class WeightChangedError(RuntimeError):
    """A weight was written to during a task, and the task cannot have made that change."""


class Matrix(ABC):
    """A weight `W` `(..., m, n)` while it is sculpted.

    Attributes:
        target: where it is in the model, and its preserved rank.
        bases: of its subspaces.
        original: `W₀`, the weight before the task.
    """

    def __init__(self, target: Target, bases: Bases, original: Original) -> None:
        self.target = target
        self.bases = bases
        self.original = original
        self._weight = target.parameter
        self._dtype, self._device = target.parameter.dtype, target.parameter.device

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def weight(self) -> Tensor:
        """`W` `(..., m, n)` as it is now, without its autograd history."""
        return self.target.oriented(self.target.parameter.detach())

    @property
    @abstractmethod
    def trained(self) -> nn.Parameter:
        """What the optimizer holds."""

    def before(self) -> Tensor:
        """`W₀` `(..., m, n)`, on the device of `W` and divided as it is."""
        weight = self.target.parameter.detach()
        return self.target.oriented(as_shard(weight, self.original.get(weight.device)))

    def check_in_place(self) -> None:
        """Raises:
        RuntimeError: the module trains something else by now, or has lost its weight.
        """
        if hasattr(self.target.parameter, "ds_id"):
            raise RuntimeError(
                f"the weight of {self.name!r} was partitioned by DeepSpeed ZeRO-3 during the task, "
                "which leaves modules without their matrices; use "
                "torch.distributed.fsdp.fully_shard (FSDP2), or ZeRO-1 or ZeRO-2"
            )

    def check_weight(self) -> None:
        """Raises:
        RuntimeError: the module has another weight by now, or it is elsewhere or of another dtype.
        """
        weight = self.target.parameter
        if weight is not self._weight:
            raise RuntimeError(
                f"the weight of {self.name!r} was replaced during the task: copy values into the "
                "parameter that is there; where fully_shard or accelerate did it, call "
                "fully_shard(model) first, then begin_task()"
            )
        if weight.dtype != self._dtype or weight.device != self._device:
            raise RuntimeError(
                f"the weight of {self.name!r} was {self._dtype} on {self._device} when the task "
                f"began and is {weight.dtype} on {weight.device} now: optimizer, bases and "
                "original weights stayed behind. Move it before begin_task() or after end_task()"
            )

    def attached(self) -> None:  # noqa: B027  (not all are guarded until then)
        """From here on an optimizer's steps end with `follow`."""

    def call_on_change(self, changed: Callable[[], None]) -> None:  # noqa: B027
        """Call `changed` before a layer computes with a weight that may not have followed."""

    @abstractmethod
    def lacks_a_step(self) -> bool:
        """Whether a step has moved what trains, and the weight has not followed."""

    def trust(self) -> None:  # noqa: B027  (not all are suspected)
        """The coordinates have been looked at."""

    def has_changed(self) -> bool:
        """Whether the task has changed anything of what this process keeps of the weight."""
        return not torch.equal(local(self.weight), local(self.before()))

    @abstractmethod
    def is_touched(self) -> bool:
        """Whether weight or coordinates may have been written to since the last `commit`."""

    @abstractmethod
    def settle(self, written: bool, thorough: bool) -> bool:
        """Take up what others wrote into the weight, or into the coordinates.

        Args:
            written: the weight is known to have been written to.
            thorough: look at values, whatever versions say.

        Returns:
            Whether the weight must follow its coordinates.

        Raises:
            WeightChangedError: the change is none that the task can have made. Nothing has been
                modified then.
        """

    @abstractmethod
    def follow(self, seed: Tensor) -> None:
        """Bring the weight up to date with an optimizer step; `commit` or `undo` comes next."""

    def commit(self) -> None:  # noqa: B027  (nothing to note for engines that train the weight)
        """The step stands."""

    def undo(self, followed: bool) -> None:  # noqa: B027  (the optimizer has moved the weight)
        """Go back to before the step, as far as the weight can; `followed` says if it moved."""

    @abstractmethod
    def truth(self) -> Tensor:
        """What the weight stands for, in float32 or the wider dtype of the weight."""

    @abstractmethod
    def protected(self) -> tuple[Side, Side]:
        """The left and the right side that must not be touched."""

    def roundings(self) -> int | None:
        """How many random roundings are in the weight; `None` where it is rounded to nearest."""
        return None

    @abstractmethod
    def end(self, *, undo: bool = False) -> None:
        """Round the truth into the weight, once, or put `W₀` back; the module is plain again."""

    def _restore(self) -> None:
        self.weight.copy_(self.before())

    def refusal(self, outside: float) -> WeightChangedError:
        change = float(whole(torch.linalg.vector_norm(self.weight - self.before())))
        return WeightChangedError(
            f"the weight of {self.name!r} was written to during the task, and this task cannot "
            f"make that change: {outside / change:.1%} of the change since begin_task() is outside "
            "of what it may move. Load weights of this task, or go back to those before it with "
            "sculpt.abandon(model). After steps of an optimizer that was not attached, call "
            "sculptor.update_weights() first"
        )


class Probe:
    """The bits of one row of every weight, to tell whether others have written to weights since.

    Versions tell as well, but not what is written through `.data`.
    """

    def __init__(self, matrices: Collection[Matrix]) -> None:
        self._weights = [matrix.target.parameter for matrix in matrices]
        self._places: list[int] = []
        self.note()

    def note(self) -> None:
        """Weights are as they should be."""
        places = self._where()
        if places != self._places:
            self._places, self._rows = places, [_row_of(weight) for weight in self._weights]
            self._bits = torch.cat(self._rows)
        elif places:
            torch.cat(self._rows, out=self._bits)  # In its place, which a CUDA graph remembers.

    def differs(self) -> list[bool]:
        """For every matrix whether it is elsewhere, or its row another one, than at `note`."""
        places = self._where()
        if not places or (
            places == self._places and torch.equal(torch.cat(self._rows), self._bits)
        ):
            return [False] * len(places)
        noted = torch.split(self._bits, [row.numel() for row in self._rows])
        rows = [_row_of(weight) for weight in self._weights]
        return [
            was != now or not torch.equal(bits, row)
            for was, now, bits, row in zip(self._places, places, noted, rows, strict=True)
        ]

    def _where(self) -> list[int]:
        return [weight.data_ptr() for weight in self._weights]


def _row_of(weight: Tensor) -> Tensor:
    """The bits of a row in the middle, or of a column where these are in order; a view."""
    matrix = weight.detach().flatten(0, -3)[0] if weight.ndim > 2 else weight.detach()
    matrix = matrix if matrix.stride(-1) == 1 else matrix.mT
    row = matrix[len(matrix) // 2]
    return (row if row.stride(0) == 1 else row[:1]).view(torch.uint8)
