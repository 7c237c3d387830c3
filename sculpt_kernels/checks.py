"""Argument validation for every public operation: one place, one wording.

Each check names the argument, what it was and what was expected, and runs before anything is
modified. Shapes follow the package's convention: matrices are `(..., m, n)`, left bases
`(..., m, r)`, right bases `(..., n, s)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sculpt_kernels.addresses import extent, overlaps_itself, side_by_side
from sculpt_kernels.operation import dispatches

FORMS = ("core", "strict", "left", "right")
# Sides of each form that may be given by a basis of what is kept instead of what is removed.
COMPLEMENTS = {
    "core": ("none", "left", "right", "both"),
    "strict": ("none", "left", "right", "both"),
    "left": ("none", "left"),
    "right": ("none", "right"),
}
PARTS = ("low", "high")
ROUNDINGS = ("nearest", "stochastic")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LOW_PRECISION = (torch.bfloat16, torch.float16)


def describe(value: Any) -> str:
    """Say what an argument was, in the words of an error message."""
    if isinstance(value, Tensor):
        shape = tuple(value.shape)
        return f"a tensor of shape {shape}, {dtype_name(value.dtype)}, on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        options = ", ".join(repr(option) for option in allowed)
        raise ValueError(f"{name} must be one of {options}; got {describe(value)}")


def matrix(name: str, X: Any, *, like: str = "(..., m, n)") -> None:
    """A floating-point tensor with at least two dimensions."""
    if not isinstance(X, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape {like}; got {describe(X)}")
    if X.dtype not in FLOATS:
        names = ", ".join(dtype_name(dtype) for dtype in FLOATS)
        raise TypeError(f"{name} must have one of the dtypes {names}; got {describe(X)}")
    if X.ndim < 2:
        raise ValueError(f"{name} must have shape {like}; got {describe(X)}")


def finite(name: str, X: Tensor) -> None:
    """Refuse NaN and infinity; reads the whole tensor, so only where it is worth a pass."""
    if X.device.type == "meta" or X.numel() == 0:
        return
    # The extremes are NaN or infinite if any element is, and need no temporary: in memory order.
    ordered = X.detach() if X.stride(-1) == 1 else X.detach().mT
    if all(math.isfinite(float(extreme)) for extreme in torch.aminmax(ordered)):
        return
    bad = int((~torch.isfinite(X)).sum())
    raise ValueError(
        f"{name} must be finite; got {bad} NaN or infinite of {X.numel()} elements in {describe(X)}"
    )


def no_wrapper(**tensors: Tensor | None) -> None:
    """No subclass that answers operators itself: what its memory holds is not known here."""
    for name, X in tensors.items():
        if X is not None and dispatches(X):
            raise TypeError(
                f"{name} must be a plain tensor; got a {type(X).__name__}, a subclass with a "
                "__torch_dispatch__ of its own; pass the tensor that it wraps"
            )


def same_device(**tensors: Tensor | None) -> None:
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device; got {listed}")


def same_dtype(**tensors: Tensor | None) -> None:
    dtypes = {name: t.dtype for name, t in tensors.items() if t is not None}
    if len(set(dtypes.values())) > 1:
        listed = ", ".join(f"{name} {dtype_name(dtype)}" for name, dtype in dtypes.items())
        raise TypeError(f"all tensors must have one dtype; got {listed}")


def writable(name: str, X: Tensor) -> None:
    """An in-place operation must not write where autograd or another element looks."""
    if X.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, so it cannot be changed in place; "
            f"pass {name}.detach() or {name}.grad, or call under torch.no_grad()"
        )
    if overlaps_itself(X):
        raise ValueError(
            f"{name} must not be an expanded or overlapping tensor (several elements share one "
            f"address); got strides {X.stride()} for shape {tuple(X.shape)}; pass {name}.clone()"
        )


def no_overlap(name: str, X: Tensor, **others: Tensor | None) -> None:
    """The operand that is written must not share memory with one that is read."""
    if X.device.type == "meta" or X.numel() == 0:
        return
    x0, x1 = extent(X)
    for other, Y in others.items():
        if Y is None or Y.device != X.device or Y.numel() == 0:
            continue
        y0, y1 = extent(Y)
        if x0 < y1 and y0 < x1 and not side_by_side(X, Y):
            raise ValueError(f"{name} is written in place and must not share memory with {other}")


def basis(name: str, B: Any, X_name: str, X: Tensor, side: str) -> None:
    """A basis of the left (`m`) or right (`n`) side of `X`, batched like `X` or shared by it."""
    axis, dim, like = (-2, "m", "(..., m, r)") if side == "left" else (-1, "n", "(..., n, s)")
    matrix(name, B, like=like)
    size = X.shape[axis]
    if B.shape[-2] != size:
        hint = " (is it transposed? bases are stored as columns)" if B.shape[-1] == size else ""
        raise ValueError(
            f"{name} must have shape {like} with {dim} = {size}, the {side} side of {X_name} "
            f"{tuple(X.shape)}; got {describe(B)}{hint}"
        )
    if B.shape[-1] > size:
        raise ValueError(
            f"{name} must have at most {size} orthonormal columns of length {size}; "
            f"got {describe(B)}"
        )
    if B.ndim != 2 and B.shape[:-2] != X.shape[:-2]:
        raise ValueError(
            f"{name} must be two-dimensional or have the batch dimensions "
            f"{tuple(X.shape[:-2])} of {X_name}; got {describe(B)}"
        )


def sides(G: Any, U: Any, V: Any, form: Any, complement: Any, name: str = "G") -> None:
    """The bases that a form uses fit the sides of the matrix, and there are no others."""
    one_of("form", form, FORMS)
    one_of("complement", complement, COMPLEMENTS[form])
    matrix(name, G)
    for which, B, side, unused in (("U", U, "left", "right"), ("V", V, "right", "left")):
        if form == unused:
            if B is not None:
                raise ValueError(f"form={form!r} does not use {which}; pass {which}=None")
        elif B is None:
            raise ValueError(f"form={form!r} needs {which}; got None")
        else:
            basis(which, B, name, G, side)


def projection(
    G: Any,
    U: Any,
    V: Any,
    form: Any,
    *,
    name: str = "G",
    complement: Any = "none",
    mixed: bool = False,
) -> None:
    """Validate `(G, U, V, form, complement)` of a projection.

    `mixed` allows bases in another dtype than `G`, as long as `U` and `V` agree.
    """
    sides(G, U, V, form, complement, name)
    operands = {name: G, "U": U, "V": V}
    same_dtype(**({"U": U, "V": V} if mixed else operands))
    no_wrapper(**operands)
    same_device(**operands)
    for which, B in (("U", U), ("V", V)):
        if B is not None:
            free_of_nan(which, B)


def free_of_nan(name: str, B: Tensor) -> None:
    """Refuse NaN and infinity in a basis on the CPU, where one vectorised sum tells.

    Elsewhere looking would wait for the device. A sum that overflows is looked into.
    """
    if B.is_cpu and not math.isfinite(B.sum().item()):
        finite(name, B)


def bases_and_coordinates(W: Tensor, U: Any, V: Any, C: Any) -> None:
    """Coordinates of `W` in bases of its two sides; a basis of `None` is the identity."""
    for name, B, side in (("U", U, "left"), ("V", V, "right")):
        if B is not None:
            basis(name, B, "W", W, side)
    matrix("C", C, like="(..., r, s)")
    r = W.shape[-2] if U is None else U.shape[-1]
    s = W.shape[-1] if V is None else V.shape[-1]
    if C.shape[-2:] != (r, s):
        raise ValueError(
            f"C must have shape (..., r, s) with r = {r} columns of U and s = {s} of V; "
            f"got {describe(C)}"
        )
    if C.ndim != 2 and C.shape[:-2] != W.shape[:-2]:
        raise ValueError(
            f"C must be two-dimensional or have the batch dimensions "
            f"{tuple(W.shape[:-2])}; got {describe(C)}"
        )


def compact(W: Any, U: Any, V: Any, C: Any, scale: Any, *, like: str = "(..., m, n)") -> None:
    """The weight of a layer that moves through `C`, and so takes no gradient of its own."""
    matrix("W", W, like=like)
    if W.requires_grad:
        raise ValueError(
            "W requires grad but would never receive one: it moves through C; "
            "call W.requires_grad_(False)"
        )
    bases_and_coordinates(W, U, V, C)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a finite number above 0; got {describe(scale)}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be a finite number above 0; got {scale}")


def rank_in(name: str, rank: Any, k: int, bound: str = "min(m, n)") -> None:
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"{name} must be an int between 0 and {k}; got {describe(rank)}")
    if not 0 <= rank <= k:
        raise ValueError(f"{name} must be between 0 and {bound} = {k}; got {rank}")


def fraction(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, float):
        raise TypeError(f"{name} must be a float strictly between 0 and 1; got {describe(value)}")
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name} must be strictly between 0 and 1; got {value}")


def floating(name: str, dtype: Any) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"{name} must be a floating dtype; got {describe(dtype)}")


def tensor_list(name: str, value: Any) -> list[Tensor]:
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a list of tensors; got {describe(value)}")
    return list(value)


def disjoint(name: str, tensors: list[Tensor]) -> None:
    """Tensors that are all written in place must not share memory with each other."""
    spans = sorted((*extent(X), i) for i, X in enumerate(tensors) if X.numel() and not X.is_meta)
    for (_, end, i), (start, _, j) in pairwise(spans):
        first, second = tensors[i], tensors[j]
        if start < end and first.device == second.device and not side_by_side(first, second):
            raise ValueError(
                f"{name} are written in place and must not share memory; "
                f"got overlapping matrices {min(i, j)} and {max(i, j)}"
            )


@contextmanager
def within(place: str) -> Iterator[None]:
    """Say in an error where in a list the offending argument was."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{place}: {error}") from None


def scalar(
    name: str,
    value: Any,
    X: Tensor,
    *,
    lower: float | None = None,
    upper: float | None = None,
    integer: bool = False,
) -> None:
    """A number in `[lower, upper)`, or a 0-d tensor, whose value is not read."""
    kind = "an int" if integer else "a number"
    if isinstance(value, Tensor):
        if value.ndim != 0:
            raise ValueError(f"{name} must be {kind} or a 0-d tensor; got {describe(value)}")
        if value.device != X.device and not value.device.type == "cpu":
            raise ValueError(f"{name} must be on {X.device} or the CPU; got {describe(value)}")
        return
    if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
        raise TypeError(f"{name} must be {kind} or a 0-d tensor; got {describe(value)}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite; got {value}")
    if (lower is not None and value < lower) or (upper is not None and value >= upper):
        span = f"at least {lower}" + ("" if upper is None else f" and below {upper}")
        raise ValueError(f"{name} must be {span}; got {value}")


def rounding(value: Any, seed: Any, name: str, X: Tensor) -> None:
    """Validate `rounding` and `seed` for a result in the dtype of `X`."""
    one_of("rounding", value, ROUNDINGS)
    if value == "nearest":
        if seed is not None:
            raise ValueError(f"seed is only for rounding='stochastic'; got seed={seed!r}")
        return
    if X.dtype not in LOW_PRECISION:
        raise TypeError(
            "rounding='stochastic' is for bfloat16 and float16; "
            f"{name} is {dtype_name(X.dtype)}, which needs none"
        )
    if isinstance(seed, Tensor):
        if seed.ndim != 0 or seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int or a 0-d int64 tensor; got {seed!r}")
    elif isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(
            f"rounding='stochastic' needs seed, an int or a 0-d int64 tensor; got {seed!r}"
        )
