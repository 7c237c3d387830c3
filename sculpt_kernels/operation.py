"""What a public operation does before anything else: autocast off, transforms refused by name.

And when it must be seen as one operator (`sculpt_kernels.ops`) instead of running at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as in_transform
from torch._C import _is_any_autocast_enabled as in_autocast
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    is_legacy_batchedtensor,
)
from torch.autograd import forward_ad
from torch.nn import Parameter

P = ParamSpec("P")
R = TypeVar("R")

# Where autocast can be on: the CPU and the kind of accelerator that torch was built for.
_ACCELERATOR = torch.accelerator.current_accelerator()
_AUTOCASTING = ("cpu",) if _ACCELERATOR is None else ("cpu", _ACCELERATOR.type)


def operation(
    *, autocast: bool = False, transforms: bool = False
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function a public operation.

    Args:
        autocast: follow it; otherwise it is off inside, and results are those of a call outside.
        transforms: may be under way, those of `torch.func` and forward-mode differentiation;
            otherwise they are a `NotImplementedError`.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            # Three flags and no further call: small matrices take a few microseconds in all.
            if (in_transform() or forward_ad._current_level >= 0) and not transforms:
                _refuse_transforms(function.__name__, (*args, *kwargs.values()))
            if in_autocast() and not autocast:
                return _outside_autocast(function, *args, **kwargs)
            return function(*args, **kwargs)

        return call

    return decorate


def _outside_autocast(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    for device in _AUTOCASTING:
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return _outside_autocast(function, *args, **kwargs)
    return function(*args, **kwargs)


def _refuse_transforms(operation: str, operands: tuple[object, ...]) -> None:
    # All but functionalization give new tensors no memory, whatever they were computed from.
    for layer in get_interpreter_stack() or ():
        if layer.key() != TransformType.Functionalize:
            name = f"torch.func.{layer.key().name.lower()}"
            raise NotImplementedError(
                f"{operation} does not support {name}, nor transforms that are made of it"
            )
    if _has_tangent(operands):
        raise NotImplementedError(
            f"{operation} does not support forward-mode differentiation (torch.autograd.forward_ad)"
        )


def _has_tangent(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_has_tangent, value))
    if not isinstance(value, Tensor):
        return False
    return forward_ad.unpack_dual(value).tangent is not None  # type: ignore[no-untyped-call]


def refuse_second_derivatives(operation: str) -> None:
    """For a backward, which records nothing of what it computes.

    Raises:
        NotImplementedError: it runs with `create_graph=True`.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{operation} does not support double backward; differentiate with create_graph=False"
        )


def refuse_batched_gradient(operation: str, gradient: Tensor) -> None:
    """For a backward that takes one gradient at a time.

    Raises:
        NotImplementedError: it runs with `is_grads_batched=True`.
    """
    if not torch.compiler.is_compiling() and is_legacy_batchedtensor(gradient):
        raise NotImplementedError(
            f"{operation} does not support torch.vmap over its backward; differentiate with "
            "is_grads_batched=False, jacobian with vectorize=False"
        )


def is_traced(X: object) -> bool:
    """Whether `X` goes to a compiler or a fake-tensor mode rather than to a device.

    Eager calls on plain tensors do not pass the operator's dispatch, which costs tens of
    microseconds; under `torch.compile` and for fake or functional tensors the operator is called.
    """
    if torch.compiler.is_compiling():
        return True
    kind = type(X)
    if kind is Tensor or kind is Parameter or not isinstance(X, Tensor):
        return False
    # Subclasses of others may compute the operator on a copy, where a write is lost.
    return dispatches(X) and kind.__module__.startswith("torch.")


def dispatches(X: Tensor) -> bool:
    """Whether the class of `X` answers every operator itself; its elements may be elsewhere."""
    return type(X).__torch_dispatch__ is not Tensor.__torch_dispatch__


def number_and_tensor(value: Any) -> tuple[Any, Tensor | None]:
    """A number or a 0-d tensor as the two arguments that an operator takes for it."""
    return (None, value) if isinstance(value, Tensor) else (value, None)
