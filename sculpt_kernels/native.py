"""The native library, which rounds stochastically on CPUs: where it is, and what it takes.

Built from `native/`. Nothing is loaded before the first question; it shares torch's threads. Its
random bits are those of `sculpt_kernels.rounding`, some ten times as fast.
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ABI = 3
NAMES = ("libsculpt_cpu.so", "libsculpt_cpu.dylib", "sculpt_cpu.dll")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
HOW_TO_BUILD = "`make native` in a checkout, or SCULPT_NATIVE=1 pip install with a C++ compiler"

_i32, _i64 = ctypes.c_int32, ctypes.c_int64


class Matrix(ctypes.Structure):
    """`sculpt_matrix`."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("stride_row", _i64),
        ("stride_column", _i64),
        ("dtype", _i32),
        ("reserved", _i32),
    )

    @classmethod
    def of(cls, X: Tensor) -> Matrix:
        """A two-dimensional tensor as the library takes it."""
        return cls(X.data_ptr(), X.stride(0), X.stride(1), DTYPES[X.dtype])


class Rounding(ctypes.Structure):
    """`sculpt_rounding`."""

    _fields_ = (
        ("row0", _i64),
        ("seed", ctypes.c_uint64),
        ("stochastic", _i32),
        ("reserved", _i32),
    )


class Library:
    """The loaded library; a call that fails raises `ValueError` with the library's own words."""

    def __init__(self, path: Path) -> None:
        """Load and check.

        Raises:
            OSError: it cannot be loaded, is no library of ours, or is of another version.
        """
        self.path = path
        handle = ctypes.CDLL(str(path))
        try:
            abi = int(handle.sculpt_cpu_abi())
        except AttributeError:
            raise OSError(f"{path} is not the native library of sculpt_kernels") from None
        if abi != ABI:
            raise OSError(
                f"{path} has ABI {abi}, this version needs {ABI}; build it again: {HOW_TO_BUILD}"
            )
        self._handle = handle
        handle.sculpt_cpu_error.restype = ctypes.c_char_p
        handle.sculpt_cpu_isa.restype = ctypes.c_char_p

    @property
    def isa(self) -> str:
        """The instruction set in use: `"avx512"`, `"avx2"` or `"scalar"`."""
        return str(self._handle.sculpt_cpu_isa().decode())

    def use_isa(self, name: str) -> None:
        self._call(self._handle.sculpt_cpu_use_isa, name.encode())

    def round(self, out: Matrix, x: Matrix, m: int, n: int, rounding: Rounding) -> None:
        """`out <- x`, `m x n`, converted and rounded."""
        by = ctypes.byref
        threads = _i32(torch.get_num_threads())
        function = self._handle.sculpt_cpu_round
        self._call(function, by(out), by(x), _i64(m), _i64(n), by(rounding), threads)

    def _call(self, function: Any, *arguments: Any) -> None:
        if function(*arguments):
            raise ValueError(self._handle.sculpt_cpu_error().decode())


def round_(out: Tensor, x: Tensor, seed: int | Tensor, row0: int) -> None:
    """`out <- x`, rounded stochastically; row 0 of both is row `row0` of what is being rounded."""
    rounding = Rounding(row0, int(seed) % 2**64, 1)
    library().round(Matrix.of(out), Matrix.of(x), out.shape[0], out.shape[1], rounding)


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
