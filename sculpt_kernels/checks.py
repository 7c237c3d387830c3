"""Argument validation for every public operation: one place, one wording.

Each check names the argument, what it was and what was expected, and runs before anything is
modified. Shapes follow the package's convention: matrices are `(..., m, n)`, left bases
`(..., m, r)`, right bases `(..., n, s)`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

FORMS = ("core", "strict", "left", "right")
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


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
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
    if X.device.type == "meta" or bool(torch.isfinite(X).all()):
        return
    bad = int((~torch.isfinite(X)).sum())
    raise ValueError(
        f"{name} must be finite; got {bad} NaN or infinite of {X.numel()} elements in {describe(X)}"
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
    if any(stride == 0 and size > 1 for size, stride in zip(X.shape, X.stride(), strict=True)):
        raise ValueError(
            f"{name} must not be an expanded tensor (several elements share one address); "
            f"got strides {X.stride()} for shape {tuple(X.shape)}; pass {name}.clone()"
        )


def no_overlap(name: str, X: Tensor, **others: Tensor | None) -> None:
    """The operand that is written must not share memory with one that is read."""
    if X.device.type == "meta" or X.numel() == 0:
        return
    for other, Y in others.items():
        if Y is None or Y.numel() == 0 or Y.device != X.device:
            continue
        x0, x1 = _extent(X)
        y0, y1 = _extent(Y)
        if x0 < y1 and y0 < x1:
            raise ValueError(f"{name} is written in place and must not share memory with {other}")


def _extent(X: Tensor) -> tuple[int, int]:
    span = sum((size - 1) * stride for size, stride in zip(X.shape, X.stride(), strict=True))
    start = X.data_ptr()
    return start, start + (span + 1) * X.element_size()


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


def orthonormal(name: str, B: Tensor) -> None:
    """Measure `max |BᵀB - I|` against what rounding allows; reads `B` once."""
    r = B.shape[-1]
    if r == 0:
        return
    finite(name, B)
    wide = B.to(torch.promote_types(B.dtype, torch.float32))
    eye = torch.eye(r, dtype=wide.dtype, device=B.device)
    defect = float((wide.mT @ wide - eye).abs().amax())
    allowed = 32 * torch.finfo(B.dtype).eps * max(1.0, math.sqrt(r) / 4)
    if not defect <= allowed:
        raise ValueError(
            f"{name} must have orthonormal columns; got max |{name}ᵀ{name} - I| = {defect:.2e}, "
            f"expected at most {allowed:.2e} for {dtype_name(B.dtype)}; "
            f"pass orthonormalize({name})"
        )


def projection(
    G: Any, U: Any, V: Any, form: Any, *, check: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Validate `(G, U, V, form)` of a projection; return the bases that the form uses."""
    choice("form", form, FORMS)
    matrix("G", G)
    left = U if form != "right" else None
    right = V if form != "left" else None
    for name, B, side, unused in (("U", U, "left", "right"), ("V", V, "right", "left")):
        if form == unused:
            if B is not None:
                raise ValueError(f"form={form!r} does not use {name}; pass {name}=None")
        elif B is None:
            raise ValueError(f"form={form!r} needs {name}; got None")
        else:
            basis(name, B, "G", G, side)
    same_dtype(G=G, U=left, V=right)
    same_device(G=G, U=left, V=right)
    if check:
        for name, B in (("U", left), ("V", right)):
            if B is not None:
                orthonormal(name, B)
    return left, right


def coordinates(
    name: str, C: Any, U: Tensor, V: Tensor, X: Tensor, *, like: str = "(..., r, s)"
) -> None:
    """Coordinates `C` of shape `(..., r, s)` for bases with `r` and `s` columns."""
    matrix(name, C, like=like)
    r, s = U.shape[-1], V.shape[-1]
    if C.shape[-2:] != (r, s):
        raise ValueError(
            f"{name} must have shape {like} with r = {r} columns of U and s = {s} of V; "
            f"got {describe(C)}"
        )
    if C.ndim != 2 and C.shape[:-2] != X.shape[:-2]:
        raise ValueError(
            f"{name} must be two-dimensional or have the batch dimensions "
            f"{tuple(X.shape[:-2])}; got {describe(C)}"
        )


def rank_in(name: str, rank: Any, k: int) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"{name} must be an int between 0 and {k}; got {describe(rank)}")
    if not 0 <= rank <= k:
        raise ValueError(f"{name} must be between 0 and min(m, n) = {k}; got {rank}")


def fraction(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, float):
        raise TypeError(f"{name} must be a float strictly between 0 and 1; got {describe(value)}")
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name} must be strictly between 0 and 1; got {value}")
