"""The native library, which rounds stochastically on CPUs: where it is, and what it takes.

Built from `native/`. Nothing is loaded before the first question; it shares torch's threads. Its
random bits are those of `sculpt_kernels.rounding`, some ten times as fast.
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

ABI = 4
NAMES = ("libsculpt_cpu.so", "libsculpt_cpu.dylib", "sculpt_cpu.dll")
DTYPES = {torch.bfloat16: 1, torch.float16: 2}
HOW_TO_BUILD = "`make native` in a checkout, or SCULPT_NATIVE=1 pip install with a C++ compiler"

_i32, _i64, _u64 = ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64


class Matrix(ctypes.Structure):
    """`sculpt_matrix`."""

    _fields_ = (("data", ctypes.c_void_p), ("stride_row", _i64), ("stride_column", _i64))

    @classmethod
    def of(cls, X: Tensor) -> Matrix:
        """A two-dimensional tensor as the library takes it."""
        return cls(X.data_ptr(), X.stride(0), X.stride(1))


class Library:
    """The loaded library; a call that fails raises `ValueError` with the library's own words."""

    def __init__(self, path: Path) -> None:
        """Load and check.

        Raises:
            OSError: it cannot be loaded, is no library of ours, or is of another version.
        """
        handle = ctypes.CDLL(str(path))
        try:
            abi = int(handle.sculpt_cpu_abi())
        except AttributeError:
            raise OSError(f"{path} is not the native library of sculpt_kernels") from None
        if abi != ABI:
            raise OSError(
                f"{path} has ABI {abi}, this version needs {ABI}; build it again: {HOW_TO_BUILD}"
            )
        handle.sculpt_cpu_error.restype = ctypes.c_char_p
        self._handle = handle

    def round(
        self, out: Matrix, dtype: int, x: Matrix, m: int, n: int, row0: int, seed: int
    ) -> None:
        """`out <- x`, `m x n`, from float32 to `dtype` by the random bits of `seed`."""
        by, threads = ctypes.byref, _i32(torch.get_num_threads())
        if self._handle.sculpt_cpu_round(
            by(out), _i32(dtype), by(x), _i64(m), _i64(n), _i64(row0), _u64(seed), threads
        ):
            raise ValueError(self._handle.sculpt_cpu_error().decode())


def round_(out: Tensor, x: Tensor, seed: int | Tensor, row0: int) -> None:
    """`out <- x`, rounded stochastically; row 0 of both is row `row0` of what is being rounded."""
    x = x.float()
    m, n = out.shape
    operands = Matrix.of(out), DTYPES[out.dtype], Matrix.of(x)
    library().round(*operands, m, n, row0, int(seed) % 2**64)


def missing() -> str | None:
    """Why there is no native library here, or `None`."""
    found = _find()
    return found if isinstance(found, str) else None


def library() -> Library:
    """The library.

    Raises:
        RuntimeError: there is none, with the reason.
    """
    found = _find()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


@lru_cache(maxsize=1)
def _find() -> Library | str:
    named = os.environ.get("SCULPT_NATIVE_LIBRARY")
    package = Path(__file__).resolve().parent
    folders = [package]
    if (package.parent / "CMakeLists.txt").exists():
        folders.append(package.parent / "build" / "native")
    candidates = [Path(named)] if named else [f / name for f in folders for name in NAMES]
    path = next((path for path in candidates if path.exists()), None)
    if path is None and named:
        return f"SCULPT_NATIVE_LIBRARY names {named}, which does not exist"
    if path is None:
        return f"the native library is not built; {HOW_TO_BUILD}"
    try:
        return Library(path)
    except OSError as error:
        return f"the native library cannot be used: {error}"
