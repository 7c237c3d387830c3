"""Finding the library, and what it refuses across the C boundary."""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from matrices import gaussian

from sculpt_kernels import backends, expand_add_, native


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
    W = torch.eye(3, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"backend='native' cannot run here: .*does not exist"):
        expand_add_(W, *(torch.eye(3) for _ in range(3)), backend="native",
                    rounding="stochastic", seed=1)  # fmt: skip


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


REFUSED = {
    "out.dtype": lambda out, x, rounding: setattr(out, "dtype", 3),
    "in.dtype": lambda out, x, rounding: setattr(x, "dtype", -1),
    "out.data must not be null": lambda out, x, rounding: setattr(out, "data", None),
    "out is written, so its strides": lambda out, x, rounding: setattr(out, "stride_row", 0),
    "rounding.stochastic is for": lambda out, x, rounding: setattr(out, "dtype", 0),
    "rounding.row0": lambda out, x, rounding: setattr(rounding, "row0", -1),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_wrong_argument_is_named_and_nothing_written(
    message: str, library: native.Library
) -> None:
    x, out = gaussian(20, 30, dtype=torch.float32), torch.zeros(20, 30, dtype=torch.bfloat16)
    operands = native.Matrix.of(out), native.Matrix.of(x), native.Rounding(0, 1, 1)
    REFUSED[message](*operands)
    with pytest.raises(ValueError, match="^" + message.replace(".", r"\.")):
        library.round(*operands[:2], 20, 30, operands[2])
    with pytest.raises(ValueError, match="m and n must not be negative"):
        library.round(*operands[:2], -1, 30, operands[2])
    assert not out.any()


def test_an_unknown_instruction_set(library: native.Library) -> None:
    with pytest.raises(ValueError, match="no instruction set sse9"):
        library.use_isa("sse9")


def test_the_structs_are_those_of_the_header() -> None:
    header = Path(__file__).parents[2] / "native/include/sculpt_kernels/cpu.h"
    assert f"#define SCULPT_CPU_ABI {native.ABI}\n" in header.read_text(encoding="utf-8")
    assert ctypes.sizeof(native.Matrix) == 32
    assert ctypes.sizeof(native.Rounding) == 24
