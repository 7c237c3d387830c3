"""The layers during a task: weights that move through coordinates only.

A module becomes one by a change of class and turns back the same way, so names, hooks and
references stay. What it holds beside its weight stays out of `state_dict`, which is that of the
plain module at every moment.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sculpt.distributed.sharding import average, local, whole
from sculpt.standing import refuse_to_move
from sculpt.targets import Place
from sculpt_kernels import compact_embedding, compact_linear, compact_weight, is_divided, project

PREFIX = "sculpt_"


def coordinates_name(parameter: str) -> str:
    """Under which name a module registers the coordinates of one of its weights."""
    return f"{PREFIX}C" if parameter == "weight" else f"{PREFIX}{parameter}_C"


@dataclass
class Coordinates:
    """How one weight `W = W₀ + scale U C Vᵀ` moves.

    Attributes:
        C: `(..., r, s)`, what trains.
        U, V: trainable bases; `None` is the identity, on the longer side with full coordinates.
        removed: with full coordinates: basis of what is preserved on the longer side; `C` has
            nothing in its span.
        folded: the coordinates that are in the weight by now.
        scale: see `sculpt.matrices.scale_of`.
    """

    C: nn.Parameter
    U: Tensor | None
    V: Tensor | None
    removed: Tensor | None
    folded: Tensor
    scale: float
    version: int = 0
    guarded: bool = True

    def __post_init__(self) -> None:
        self.note_current()

    def note_current(self) -> None:
        """The weight contains the coordinates as they are now."""
        self.version = self.C._version

    def check_current(self, C: Tensor, name: str) -> None:
        """Refuse to compute with a weight that has not followed its coordinates.

        Raises:
            RuntimeError: the coordinates have changed since.
        """
        # What happens to a divided tensor, or to a flat buffer that one is part of, is not counted.
        uncounted = is_divided(C) or C.untyped_storage().nbytes() != C.nbytes
        if not self.guarded or (C._version == self.version and not uncounted):
            return
        if not torch.equal(local(C.detach()), local(self.folded)):
            raise RuntimeError(
                f"the coordinates of {name!r} have changed but its weight has not followed: a step "
                "would be lost. Call sculptor.attach(optimizer) before the first step, or "
                "sculptor.update_weights() after changing coordinates by hand"
            )
        self.version = C._version

    def end(self, weight: Tensor) -> None:
        """Whoever still holds the coordinates of this weight trains nothing from now on."""
        self.C.grad = None
        self.C.sculpt_ended = id(weight)  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> Coordinates:
        """A copy of the model, an average for instance, goes its own ways: it is not guarded."""
        C, U, V, removed = deepcopy((self.C, self.U, self.V, self.removed), memo)
        return Coordinates(C, U, V, removed, self.folded, self.scale, guarded=False)


def ended_of(parameter: Tensor) -> int | None:
    """The id of the weight whose coordinates these were in a task that is over, or None."""
    found: int | None = getattr(parameter, "sculpt_ended", None)
    return found


class Compact(nn.Module):
    """What all layers with coordinates share."""

    sculpt: dict[str, Coordinates]

    def sculpt_inputs(self, parameter: str) -> dict[str, Any]:
        """Bases, scale, and the coordinates whose gradient stays in the allowed set."""
        state = self.sculpt[parameter]
        C: Tensor | None = self._parameters.get(coordinates_name(parameter))
        if C is None:
            raise RuntimeError(
                f"the coordinates of {type(self).__name__}.{parameter} were taken away, as "
                "FullyShardedDataParallel (FSDP1) does, which flattens parameters: call "
                "torch.distributed.fsdp.fully_shard (FSDP2) on the model, then begin_task()"
            )
        if not torch.compiler.is_compiling():
            state.check_current(C, f"{type(self).__name__}.{parameter}")
        if is_divided(C):
            C = average(C)
        if state.removed is not None:
            C = _Confined.apply(C, state.removed, state.U is None)  # type: ignore[no-untyped-call]
        return {"U": state.U, "V": state.V, "C": C, "scale": state.scale}

    def extra_repr(self) -> str:
        shapes = (f"{name}: C {tuple(state.C.shape)}" for name, state in self.sculpt.items())
        return ", ".join(filter(None, (super().extra_repr(), *shapes)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for state in self.sculpt.values():
            refuse_to_move(state.C, fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for parameter in self.sculpt:
            destination.pop(prefix + coordinates_name(parameter), None)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        for parameter in self.sculpt:
            if prefix + coordinates_name(parameter) in missing:
                missing.remove(prefix + coordinates_name(parameter))


class CompactLinear(Compact, nn.Linear):
    """`y = x Wᵀ + bias` without a dense weight gradient."""

    def forward(self, input: Tensor) -> Tensor:
        return compact_linear(input, self.weight, self.bias, **self.sculpt_inputs("weight"))


class CompactEmbedding(Compact, nn.Embedding):
    """Rows of `W` without a dense table gradient."""

    def forward(self, input: Tensor) -> Tensor:
        return compact_embedding(
            input, self.weight, **self.sculpt_inputs("weight"), padding_idx=self.padding_idx
        )


class CompactOther(Compact):
    """Any other layer: whatever it does with its weights, they are differentiable in `C`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # A layer that reads its weight many times, once for every expert, shares one gradient.
        self.__dict__["sculpt_live"] = {name: self.sculpt_weight(name) for name in self.sculpt}
        try:
            return super().forward(*args, **kwargs)
        finally:
            del self.__dict__["sculpt_live"]

    def sculpt_weight(self, parameter: str) -> Tensor:
        weight = self._parameters[parameter]
        assert weight is not None
        return compact_weight(weight, **self.sculpt_inputs(parameter))


def install(place: Place, state: Coordinates) -> None:
    """Make the module move the weight through its coordinates."""
    module, parameter = place.module, place.parameter
    module.__dict__.setdefault("sculpt", {})[parameter] = state
    kind: Any = type(module)
    module.__class__ = _compact_class(kind, parameter)
    module.register_parameter(coordinates_name(parameter), state.C)


def remove(place: Place) -> None:
    """Turn the module back into the plain one it was; its weights stay as they are."""
    module = place.module
    if not isinstance(module, Compact):
        return
    for parameter in module.sculpt:
        del module._parameters[coordinates_name(parameter)]
    del module.__dict__["sculpt"]
    plain: Any = next(kind for kind in type(module).__mro__ if not issubclass(kind, Compact))
    module.__class__ = plain


@cache
def _compact_class(kind: Any, parameter: str) -> Any:
    """The class that `kind` becomes when one of its parameters gets coordinates."""
    # fully_shard puts a class of its own in front of a module's.
    plain = kind.__bases__[-1] if kind.__bases__[0].__name__ == "FSDPModule" else kind
    for layer, compact in ((nn.Linear, CompactLinear), (nn.Embedding, CompactEmbedding)):
        if parameter == "weight" and plain is layer:
            return compact if kind is layer else type(kind.__name__, (compact, kind), {})
    if parameter == "weight" and plain.__name__ == "Conv1D":
        return type("CompactConv1D", (Compact, kind), {"forward": _conv1d_forward})
    reader = {parameter: property(_reader(parameter))}
    if issubclass(kind, CompactOther):
        return type(kind.__name__, (kind,), reader)
    return type(f"Compact{kind.__name__}", (CompactOther, kind), reader)


def _conv1d_forward(self: Any, x: Tensor) -> Tensor:
    return compact_linear(x, self.weight.mT, self.bias, **self.sculpt_inputs("weight"))


def _reader(parameter: str) -> Callable[[Any], Tensor]:
    def read(self: CompactOther) -> Tensor:
        stored = self._parameters[parameter]
        if is_divided(stored):  # Asked for by fully_shard, between computations.
            return stored
        live = self.__dict__.get("sculpt_live")
        return self.sculpt_weight(parameter) if live is None else live[parameter]

    return read


class _Confined(torch.autograd.Function):
    """The coordinates themselves; their gradient has nothing in the span of `removed`."""

    @staticmethod
    def forward(ctx: Any, C: Tensor, removed: Tensor, left: bool) -> Tensor:
        ctx.save_for_backward(removed)
        ctx.left = left
        return C.view_as(C)

    @staticmethod
    def backward(ctx: Any, dC: Tensor) -> tuple[Tensor, None, None]:
        (removed,) = ctx.saved_tensors
        return away_from(dC, removed, ctx.left), None, None


def away_from(C: Tensor, removed: Tensor, left: bool) -> Tensor:
    """Coordinates without their part in the span of `removed`, on their longer side."""
    removed = (removed if is_divided(C) else whole(removed)).to(C.dtype)
    if left:
        return project(C, removed, form="left")
    return project(C, V=removed, form="right")
