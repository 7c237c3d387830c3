"""Where in memory the elements of a tensor are: what may be written in place without a clash."""

from __future__ import annotations

from torch import Tensor


def extent(X: Tensor) -> tuple[int, int]:
    """The first byte of `X` and the one after its last."""
    start = X.data_ptr()
    if X.is_contiguous():
        return start, start + X.numel() * X.element_size()
    span = sum((size - 1) * stride for size, stride in zip(X.shape, X.stride(), strict=True))
    return start, start + (span + 1) * X.element_size()


def side_by_side(X: Tensor, Y: Tensor) -> bool:
    """Column ranges of one row-major buffer interleave in memory and yet share no element."""
    size, pitch = X.element_size(), X.stride(0)
    if X.ndim != 2 or Y.ndim != 2 or Y.element_size() != size or Y.stride(0) != pitch:
        return False
    if X.stride(1) != 1 or Y.stride(1) != 1 or pitch == 0:
        return False
    offset, rest = divmod(Y.data_ptr() - X.data_ptr(), size)
    gap = offset % pitch
    return rest == 0 and gap >= X.shape[1] and gap + Y.shape[1] <= pitch


def overlaps_itself(X: Tensor) -> bool:
    """Whether two elements of `X` share an address.

    They do where some steps along the dimensions, not all of them zero, lead back to the start.
    Where each stride is longer than all that the smaller ones span, as usual, no step can.
    """
    if X.is_contiguous() or X.numel() == 0:
        return False
    steps = sorted(zip(X.stride(), X.shape, strict=True), reverse=True)
    dims = [(stride, size - 1) for stride, size in steps if size > 1]
    if any(stride == 0 for stride, _ in dims):
        return True
    return any(
        _leads_back(dims[i + 1 :], stride * count)
        for i, (stride, most) in enumerate(dims)
        for count in range(1, 1 + min(most, _span(dims[i + 1 :]) // stride))
    )


def _leads_back(dims: list[tuple[int, int]], distance: int) -> bool:
    """Whether steps along `dims`, at most so many of each either way, add up to `distance`."""
    if not dims:
        return distance == 0
    (stride, most), *rest = dims
    reach = _span(rest)
    # What is left after `count` steps must be within the reach of the others.
    least, last = -((reach - distance) // stride), (distance + reach) // stride
    return any(
        _leads_back(rest, distance - stride * count)
        for count in range(max(-most, least), 1 + min(most, last))
    )


def _span(dims: list[tuple[int, int]]) -> int:
    return sum(stride * most for stride, most in dims)
