"""The native library: where it is, whether it fits, and its C structs; built from `native/`.

Nothing is loaded before the first question. The library shares torch's OpenMP threads, and the
products of its panels go to the BLAS that torch brings along.
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ABI = 2
NAMES = ("libsculpt_cpu.so", "libsculpt_cpu.dylib", "sculpt_cpu.dll")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FORMS = {"core": 0, "strict": 1, "left": 2, "right": 3}
# at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, paired), types in the name.
BRGEMM = "_ZN2at6native7cpublas6brgemmEllllllbPK{}Pfb"
HOW_TO_BUILD = "`make native` in a checkout, or SCULPT_NATIVE=1 pip install with a C++ compiler"

_i32, _i64, _f32, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class Matrix(ctypes.Structure):
    """`sculpt_matrix`."""

    _fields_ = (
        ("data", _pointer),
        ("stride_row", _i64),
        ("stride_column", _i64),
        ("dtype", _i32),
        ("reserved", _i32),
    )


class Products(ctypes.Structure):
    """`sculpt_products`."""

    _fields_ = (
        *((name, _i64) for name in ("m", "n", "r", "s")),
        ("U", Matrix),
        ("V", Matrix),
        *((name, _pointer) for name in ("sgemm", "row_gemm", "row_gemm_bfloat16")),
        ("workspace", _pointer),
        ("workspace_floats", _i64),
        *((name, _i32) for name in ("form", "left_first", "threads", "panel_rows")),
    )


class Rounding(ctypes.Structure):
    """`sculpt_rounding`."""

    _fields_ = (
        ("row0", _i64),
        ("seed", ctypes.c_uint64),
        ("stochastic", _i32),
        ("reserved", _i32),
    )


class ExpandAdd(ctypes.Structure):
    """`sculpt_expand_add`."""

    _fields_ = (
        ("products", Products),
        ("W", Matrix),
        ("base", Matrix),
        ("C", _pointer),
        ("rounding", Rounding),
    )


class AdamW(ctypes.Structure):
    """`sculpt_adamw`."""

    _fields_ = (
        ("products", Products),
        *((name, Matrix) for name in ("W", "G", "exp_avg", "exp_avg_sq", "copy")),
        *((name, _f32) for name in ("lr", "rest1", "rest2", "eps", "weight_decay")),
        ("lift", _f32),
        ("root", _f32),
        ("gradient", _i32),
        ("rounding", Rounding),
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
        handle.sculpt_cpu_workspace.restype = _i64
        handle.sculpt_cpu_multiplies.argtypes = [_pointer, ctypes.c_bool]
        symbols = _torch_symbols()
        self.sgemm = _address(symbols, "sgemm_")
        if not self.sgemm:
            raise OSError("this build of torch exports no BLAS (sgemm_)")
        self._row_gemms = {
            torch.float32: _address(symbols, BRGEMM.format("fS3_")),
            torch.bfloat16: _address(symbols, BRGEMM.format("N3c108BFloat16ES5_")),
        }

    @property
    def isa(self) -> str:
        """The instruction set in use: `"avx512"`, `"avx2"` or `"scalar"`."""
        return str(self._handle.sculpt_cpu_isa().decode())

    def use_isa(self, name: str) -> None:
        self._call(self._handle.sculpt_cpu_use_isa, name.encode())

    def row_gemm(self, dtype: torch.dtype) -> int:
        """Address of torch's own product of row-major panels, 0 where it cannot run now.

        It belongs to oneDNN, which a user can turn off; then it throws, or calls the BLAS.
        """
        address = self._row_gemms[dtype]
        if not address or not torch.backends.mkldnn.enabled or not _has_row_gemm(dtype):
            return 0
        right = self._handle.sculpt_cpu_multiplies(address, dtype == torch.bfloat16)
        return address if right else 0

    def workspace(self, products: Products) -> Tensor:
        """Memory for these products, aligned to 64 bytes, entered into them."""
        floats = int(self._handle.sculpt_cpu_workspace(ctypes.byref(products)))
        if floats < 0:
            raise ValueError(self._handle.sculpt_cpu_error().decode())
        memory = torch.empty(floats + 16, dtype=torch.float32)
        products.workspace = memory.data_ptr() + -memory.data_ptr() % 64
        products.workspace_floats = floats
        return memory

    def expand_add(self, job: ExpandAdd) -> None:
        self._call(self._handle.sculpt_cpu_expand_add, ctypes.byref(job))

    def project_adamw(self, job: AdamW) -> None:
        self._call(self._handle.sculpt_cpu_project_adamw, ctypes.byref(job))

    def round(self, out: Matrix, x: Matrix, m: int, n: int, rounding: Rounding) -> None:
        by = ctypes.byref
        self._call(
            self._handle.sculpt_cpu_round, by(out), by(x), _i64(m), _i64(n), by(rounding),
            _i32(torch.get_num_threads()),
        )  # fmt: skip

    def _call(self, function: Any, *arguments: Any) -> None:
        if function(*arguments):
            raise ValueError(self._handle.sculpt_cpu_error().decode())


def describe(X: Tensor | None) -> Matrix:
    """A two-dimensional tensor as the library takes it; null for `None`."""
    if X is None:
        return Matrix()
    return Matrix(X.data_ptr(), X.stride(0), X.stride(1), DTYPES[X.dtype])


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


@lru_cache(maxsize=2)
def _has_row_gemm(dtype: torch.dtype) -> bool:
    """Whether the CPU has the instructions that make it the fastest."""
    has: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    if dtype == torch.bfloat16:
        # Whoever uses AMX has to release its tiles, which only oneDNN's owner can.
        return bool(has.get("avx512_bf16")) and not has.get("amx_bf16")
    return bool(has.get("avx512_f"))


def _torch_symbols() -> ctypes.CDLL:
    """The libraries that torch has loaded: a symbol is looked up in what they depend on too."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            return ctypes.CDLL(str(folder / name))
    raise OSError(f"there is no library of torch in {folder}")


def _address(symbols: ctypes.CDLL, name: str) -> int:
    function = getattr(symbols, name, None)
    return 0 if function is None else ctypes.cast(function, _pointer).value or 0
