"""Finding the library, and what it refuses across the C boundary."""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from matrices import basis, gaussian

from sculpt_kernels import backends, expand_add_, native, native_backend, project_


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Look for the library anew, before and after."""
    native._find.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    native._find.cache_clear()


def test_a_named_library_that_is_not_there(search: pytest.MonkeyPatch, tmp_path: Path) -> None:
    search.setenv("SCULPT_NATIVE_LIBRARY", str(tmp_path / "none.so"))
    assert backends()["native"].startswith("SCULPT_NATIVE_LIBRARY names")
    with pytest.raises(RuntimeError, match=r"backend='native' cannot run here: .*does not exist"):
        expand_add_(*(torch.eye(3) for _ in range(4)), backend="native")


def test_without_a_library_everything_works(search: pytest.MonkeyPatch) -> None:
    search.setattr(native, "NAMES", ("libnone.so",))
    assert backends()["native"].startswith("the native library is not built; `make native`")
    W = gaussian(4, 4, dtype=torch.bfloat16)
    one = torch.eye(4)
    expand_add_(W, one, one, one, rounding="stochastic", seed=0)


def test_a_file_that_is_no_library(search: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "libsculpt_cpu.so"
    path.write_text("nothing")
    search.setenv("SCULPT_NATIVE_LIBRARY", str(path))
    assert backends()["native"].startswith("the native library cannot be used")


def test_a_library_of_somebody_else(search: pytest.MonkeyPatch) -> None:
    name = ctypes.util.find_library("m")
    if name is None:
        pytest.skip("no math library to take for one of ours")
    with pytest.raises(OSError, match="is not the native library of sculpt_kernels"):
        native.Library(Path(name))


def test_a_library_of_another_version(search: pytest.MonkeyPatch, library: native.Library) -> None:
    search.setattr(native, "ABI", native.ABI + 1)
    native._find.cache_clear()
    reason = backends()["native"]
    assert f"has ABI {native.ABI - 1}, this version needs {native.ABI}" in reason
    assert "build it again" in reason


def test_operations_without_a_native_kernel(library: native.Library) -> None:
    with pytest.raises(RuntimeError, match=r"native.*has no kernel for this"):
        project_(torch.eye(4), torch.eye(4), torch.eye(4), backend="native")


def job() -> tuple[native.ExpandAdd, list[torch.Tensor]]:
    W, C = gaussian(20, 30, dtype=torch.float32), gaussian(2, 3, dtype=torch.float32)
    U, V = basis(20, 2, dtype=torch.float32), basis(30, 3, dtype=torch.float32)
    described = native.describe(W)
    products = native_backend._products(W, U, V, "core")
    made = native.ExpandAdd(products, described, described, C.data_ptr(), native.Rounding())
    memory = native.library().workspace(made.products)
    return made, [W, C, U, V, memory]


REFUSED = {
    "W.dtype": lambda j: setattr(j.W, "dtype", 3),
    "base.dtype": lambda j: setattr(j.base, "dtype", -1),
    "W.data must not be null": lambda j: setattr(j.W, "data", None),
    "W is written, so its strides": lambda j: setattr(j.W, "stride_row", 0),
    "U.dtype": lambda j: setattr(j.products.U, "dtype", 1),
    "U must be row- or column-major": lambda j: setattr(j.products.U, "stride_column", 2),
    "V must be row- or column-major": lambda j: setattr(j.products.V, "stride_row", 1),
    "m, n, r and s": lambda j: setattr(j.products, "m", -1),
    "form": lambda j: setattr(j.products, "form", 1),
    "threads": lambda j: setattr(j.products, "threads", 0),
    "panel_rows": lambda j: setattr(j.products, "panel_rows", -1),
    "sgemm": lambda j: setattr(j.products, "sgemm", None),
    "workspace must have": lambda j: setattr(j.products, "workspace_floats", 3),
    "workspace must be aligned": lambda j: setattr(
        j.products, "workspace", j.products.workspace + 4
    ),
    "C must not be null": lambda j: setattr(j, "C", None),
    "rounding.stochastic is for": lambda j: setattr(j.rounding, "stochastic", 1),
    "rounding.row0": lambda j: setattr(j.rounding, "row0", -1),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_wrong_argument_is_named_and_nothing_written(
    message: str, library: native.Library
) -> None:
    made, tensors = job()
    REFUSED[message](made)
    before = tensors[0].clone()
    with pytest.raises(ValueError, match="^" + message.replace(".", r"\.")):
        library.expand_add(made)
    assert torch.equal(tensors[0], before)


def test_the_same_job_without_the_fault(library: native.Library) -> None:
    made, tensors = job()
    before = tensors[0].clone()
    library.expand_add(made)
    assert not torch.equal(tensors[0], before)


@pytest.mark.parametrize("paired", [False, True])
def test_a_product_is_taken_only_if_it_is_right(paired: bool, library: native.Library) -> None:
    sizes = [ctypes.c_int64] * 6 + [ctypes.c_bool] + [ctypes.c_void_p] * 3 + [ctypes.c_bool]
    nothing = ctypes.CFUNCTYPE(None, *sizes)(lambda *_: None)
    address = ctypes.cast(nothing, ctypes.c_void_p).value
    assert library._handle.sculpt_cpu_multiplies(address, paired) == 0
    assert library._handle.sculpt_cpu_multiplies(None, paired) == 0


def test_an_unknown_instruction_set(library: native.Library) -> None:
    with pytest.raises(ValueError, match="no instruction set sse9"):
        library.use_isa("sse9")


def test_the_structs_are_those_of_the_header() -> None:
    header = Path(__file__).parents[2] / "native/include/sculpt_kernels/cpu.h"
    assert f"#define SCULPT_CPU_ABI {native.ABI}\n" in header.read_text(encoding="utf-8")
    assert ctypes.sizeof(native.Matrix) == 32
    assert ctypes.sizeof(native.Products) == 32 + 2 * 32 + 5 * 8 + 16
    assert ctypes.sizeof(native.ExpandAdd) == 152 + 2 * 32 + 8 + 24
    assert ctypes.sizeof(native.AdamW) == 152 + 5 * 32 + 32 + 24
