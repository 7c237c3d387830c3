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
    "dtype must be 1": {"dtype": 3},
    "out.data must not be null": {"out": native.Matrix(None, 30, 1)},
    "out is written, so its strides": {"out": native.Matrix(1, 0, 1)},
    "row0 must not be negative": {"row0": -1},
    "m and n must not be negative": {"m": -1},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_wrong_argument_is_named_and_nothing_written(
    message: str, library: native.Library
) -> None:
    x, out = gaussian(20, 30, dtype=torch.float32), torch.zeros(20, 30, dtype=torch.bfloat16)
    given = {"out": native.Matrix.of(out), "dtype": 1, "x": native.Matrix.of(x)}
    given |= {"m": 20, "n": 30, "row0": 0, "seed": 1}
    with pytest.raises(ValueError, match="^" + message.replace(".", r"\.")):
        library.round(**given | REFUSED[message])
    assert not out.any()


def test_the_struct_is_that_of_the_header() -> None:
    header = Path(__file__).parents[2] / "native/include/sculpt_kernels/cpu.h"
    assert f"#define SCULPT_CPU_ABI {native.ABI}\n" in header.read_text(encoding="utf-8")
    assert ctypes.sizeof(native.Matrix) == 24
