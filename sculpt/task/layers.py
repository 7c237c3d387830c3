"""The layers during a task: weights that move through coordinates only.

A module becomes one by a change of class and turns back the same way, so names, hooks and
references stay. What it holds beside its weight stays out of `state_dict`, which is that of the
plain module at every moment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sculpt.distributed.sharding import average, local, whole
from sculpt.task.guards import refuse_to_move
from sculpt.task.targets import Place
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
        U, V: trainable bases; `None` is the identity.
        removed: with full coordinates: basis of what is preserved on the longer side; `C` has
            nothing in its span.
        folded: the coordinates that are in the weight by now; `None` where the weight tells.
        scale: see `sculpt.task.matrix.scale_of`.
        changed: called before a layer computes with coordinates or a weight that are not known to
            belong together; `None` in copies of the model, which nobody keeps up to date.
        attached: an optimizer keeps them up to date.
        suspect: values must be compared, whatever their versions say.
        loaded: `load_state_dict` has put other values into the weight.
    """

    C: nn.Parameter
    U: Tensor | None
    V: Tensor | None
    removed: Tensor | None
    folded: Tensor | None
    scale: float
    changed: Callable[[], None] | None = None
    attached: bool = False
    suspect: bool = False
    loaded: bool = False
    seen: tuple[int, int] = (0, 0)

    def versions(self, weight: Tensor) -> tuple[int, int]:
        """They count changes; what happens to a divided tensor is not counted."""
        return (0, 0) if is_divided(self.C) else (self.C._version, weight._version)

    def note_current(self, weight: Tensor) -> None:
        """The weight contains the coordinates, as both are now."""
        self.seen = self.versions(weight)
        self.suspect = self.loaded = False

    def is_touched(self, weight: Tensor) -> bool:
        """Whether one of both may have been written to since `note_current`."""
        if self.suspect or self.loaded or self.versions(weight) != self.seen:
            return True
        # Whoever divides tensors, or puts them into a flat buffer, changes them without counting.
        C = self.C
        uncounted = is_divided(C) or C.untyped_storage().nbytes() != C.nbytes
        return uncounted and not self.attached and self.has_moved()

    def has_moved(self) -> bool:
        """Whether the coordinates are not those that are in the weight; True where none tell."""
        folded = self.folded
        return folded is None or not torch.equal(local(self.C.detach()), local(folded))

    def check_current(self, weight: Tensor) -> None:
        """Have it seen to that the weight follows, where it may not have."""
        if self.changed is not None and self.is_touched(weight):
            self.changed()

    def end(self, weight: Tensor) -> None:
        """Whoever still holds the coordinates of this weight trains nothing from now on."""
        self.changed = None
        self.C.grad = None
        self.C.sculpt_ended = id(weight)  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model, an average for instance, goes its own ways."""
        return vars(self) | {"changed": None, "folded": None}


class Compact(nn.Module):
    """What all layers with coordinates share."""

    sculpt: dict[str, Coordinates]

    def sculpt_inputs(self, parameter: str, *, checked: bool = True) -> dict[str, Any]:
        """Weight, bases, scale, and the coordinates whose gradient stays in the allowed set."""
        state = self.sculpt[parameter]
        weight = self._parameters[parameter]
        C: Tensor | None = self._parameters.get(coordinates_name(parameter))
        if C is None:
            raise RuntimeError(
                f"the coordinates of {type(self).__name__}.{parameter} were taken away, as "
                "FullyShardedDataParallel (FSDP1) does, which flattens parameters: call "
                "torch.distributed.fsdp.fully_shard (FSDP2) on the model, then begin_task()"
            )
        assert weight is not None
        if checked and not torch.compiler.is_compiling():
            state.check_current(weight)
        if is_divided(C):
            C = average(C)
        if state.removed is not None:
            C = _Confined.apply(C, state.removed, state.U is None)  # type: ignore[no-untyped-call]
        return {"W": weight, "U": state.U, "V": state.V, "C": C, "scale": state.scale}

    def sculpt_weight(self, parameter: str, *, checked: bool = True) -> Tensor:
        """The weight, differentiable in its coordinates."""
        return compact_weight(**self.sculpt_inputs(parameter, checked=checked))

    def train(self, mode: bool = True) -> Any:
        if mode != self.training:
            # Averages are swapped in around an evaluation, by ways that count no change.
            for state in self.sculpt.values():
                state.suspect = True
        return super().train(mode)

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
        untouched = []
        for parameter, state in self.sculpt.items():
            weight, given = self._parameters[parameter], state_dict.get(prefix + parameter)
            assert weight is not None
            same = given is None or (
                given.shape == weight.shape
                and torch.equal(local(given).to(weight.device, weight.dtype), local(weight))
            )
            state.loaded = state.loaded or not same
            if same and state.versions(weight) == state.seen:
                untouched.append((state, weight))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        for state, weight in untouched:
            state.seen = state.versions(weight)
        for parameter in self.sculpt:
            if prefix + coordinates_name(parameter) in missing:
                missing.remove(prefix + coordinates_name(parameter))


class LiveWeight(Tensor):
    """A weight that is read past its layer's `forward`: its gradient reaches the coordinates.

    It shares memory with the parameter; `.data` and `.grad` are the parameter's.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    sculpt_parameter: nn.Parameter

    @property
    def data(self) -> Tensor:
        return self.sculpt_parameter.data

    @data.setter
    def data(self, value: Tensor) -> None:
        self.sculpt_parameter.data = value

    @property
    def grad(self) -> Tensor | None:
        return self.sculpt_parameter.grad

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self.sculpt_parameter.grad = value


def _reader(parameter: str) -> property:
    """An attribute that gives a weight with the gradient of its coordinates, where one is wanted.

    Without gradients it is the parameter itself.
    """

    def read(self: Compact) -> Tensor:
        stored = self._parameters.get(parameter)
        if stored is None:  # Wrappers may have put a tensor there.
            other: Tensor | None = self.__dict__.get(parameter)
            if other is None:
                raise AttributeError(f"{type(self).__name__} has no {parameter}")
            return other
        # fully_shard asks for the parameter between computations.
        if not torch.is_grad_enabled() or is_divided(stored):
            return stored
        live: Tensor | None = self.__dict__.get("sculpt_live", {}).get(parameter)
        if live is not None:
            return live
        live = self.sculpt_weight(parameter, checked=False)
        if torch.compiler.is_compiling() or type(live) is not Tensor:
            return live
        live = live.as_subclass(LiveWeight)
        live.sculpt_parameter = stored
        return live

    def write(self: Compact, value: Tensor) -> None:
        self.__dict__[parameter] = value

    def delete(self: Compact) -> None:
        del self.__dict__[parameter]

    return property(read, write, delete)


class CompactLinear(Compact, nn.Linear):
    """`y = x Wᵀ + bias` without a dense weight gradient."""

    weight = _reader("weight")

    def forward(self, input: Tensor) -> Tensor:
        return compact_linear(input, bias=self.bias, **self.sculpt_inputs("weight"))


class CompactConv1D(Compact):
    """`y = x W + bias` of GPT-2, which stores its weight `in x out`."""

    bias: Tensor | None
    weight = _reader("weight")

    def forward(self, x: Tensor) -> Tensor:
        inputs = self.sculpt_inputs("weight")
        return compact_linear(x, bias=self.bias, **inputs | {"W": inputs["W"].mT})

    def sculpt_weight(self, parameter: str, *, checked: bool = True) -> Tensor:
        inputs = self.sculpt_inputs(parameter, checked=checked)
        return compact_weight(**inputs | {"W": inputs["W"].mT}).mT


class CompactEmbedding(Compact, nn.Embedding):
    """Rows of `W` without a dense table gradient."""

    weight = _reader("weight")

    def forward(self, input: Tensor) -> Tensor:
        return compact_embedding(
            input, padding_idx=self.padding_idx, **self.sculpt_inputs("weight")
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
    if parameter == "weight" and plain in (nn.Linear, nn.Embedding):
        compact = CompactLinear if plain is nn.Linear else CompactEmbedding
        return compact if kind is plain else type(kind.__name__, (compact, kind), {})
    if parameter == "weight" and plain.__name__ == "Conv1D":
        return type("CompactConv1D", (CompactConv1D, kind), {})
    reader = {parameter: _reader(parameter)}
    if issubclass(kind, CompactOther):
        return type(kind.__name__, (kind,), reader)
    return type(f"Compact{kind.__name__}", (CompactOther, kind), reader)


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
