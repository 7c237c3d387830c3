"""When an operation must be seen as one operator instead of running at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter


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
