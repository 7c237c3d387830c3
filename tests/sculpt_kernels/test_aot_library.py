"""Kernels compiled ahead of time, from C++: built by CMake, installed, found, linked and launched.

A driver that launches nothing stands in for CUDA's and remembers what it was asked for.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import triton

from sculpt_kernels.aot.calls import calls

ROOT = Path(__file__).resolve().parents[2]
NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia"
OPERATIONS = ("project_left_4096x4096_r128_bfloat16", "update_stochastic_4096x4096_r128_bfloat16")
NO_CONTEXT, FAILS = 0, 1


def run(*command: Any, **options: Any) -> str:
    done = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, **options,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def tools() -> dict[str, str]:
    beside = str(Path(sys.executable).parent)
    found = {
        name: shutil.which(name, path=beside) or shutil.which(name) for name in ("cmake", "g++")
    }
    missing = [name for name, path in found.items() if path is None]
    if missing:
        pytest.skip(f"there is no {' and no '.join(missing)}")
    return {name: str(path) for name, path in found.items()}


@pytest.fixture(scope="module")
def driver(tools: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("cuda") / "libcuda.so.1"
    run(
        tools["g++"], "-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC",
        "-Wl,-soname,libcuda.so.1", ROOT / "native/tests/fake_cuda.cpp", "-o", library,
    )  # fmt: skip
    return library


@pytest.fixture(scope="module")
def installed(tools: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    run(
        tools["cmake"], "-S", ROOT, "-B", folder / "build", "-DSCULPT_CPU=OFF", "-DSCULPT_AOT=ON",
        "-DSCULPT_AOT_ARCHS=90", f"-DSCULPT_AOT_ONLY={';'.join(OPERATIONS)}", "-DBUILD_TESTING=OFF",
        f"-DPython3_EXECUTABLE={sys.executable}", "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON",
    )  # fmt: skip
    run(tools["cmake"], "--build", folder / "build")
    run(tools["cmake"], "--install", folder / "build", "--prefix", folder / "prefix")
    return folder / "prefix"


class Library:
    """The launcher and the driver beneath it, in this process."""

    def __init__(self, installed: Path, driver: Path) -> None:
        self.cuda = ctypes.CDLL(str(driver), mode=ctypes.RTLD_GLOBAL)  # found by its soname
        self.aot = ctypes.CDLL(str(next(installed.glob("lib*/libsculpt_aot.so"))))
        self.aot.sculpt_aot_error.restype = ctypes.c_char_p
        self.aot.sculpt_aot_operation.restype = ctypes.c_char_p
        self.aot.sculpt_aot_workspace.restype = ctypes.c_int64

    def run(self, name: str, tensors: list[int], workspace: int) -> str:
        """What went wrong, or nothing."""
        given = (ctypes.c_uint64 * len(tensors))(*tensors)
        failed = self.aot.sculpt_aot_run(
            name.encode(), given, len(tensors), ctypes.c_uint64(workspace), ctypes.c_void_p(77)
        )
        return str(self.aot.sculpt_aot_error().decode()) if failed else ""

    def log(self) -> list[int]:
        values = ctypes.POINTER(ctypes.c_uint64)()
        return list(values[: self.cuda.fake_log(ctypes.byref(values))])


@pytest.fixture
def library(installed: Path, driver: Path) -> Library:
    if torch.cuda.is_available():
        pytest.skip("CUDA's own driver is loaded already")
    made = Library(installed, driver)
    made.cuda.fake_reset(90, 1, 0)
    return made


def parameter_sizes(cubin: Path) -> list[int]:
    """Bytes of each parameter of a kernel, as its machine code declares them."""
    text = run(NVIDIA / "bin" / "cuobjdump", "-elf", cubin)
    found = re.findall(r"Ordinal : (0x\w+)\s+Offset  : \w+\s+Size    : (0x\w+)", text)
    return [int(size, 16) for _, size in sorted(found, key=lambda pair: int(pair[0], 16))]


def bits(value: Any, kind: str) -> int:
    if kind == "fp32":
        return int(struct.unpack("<I", struct.pack("<f", value))[0])
    return int(value)


@pytest.mark.parametrize("name", OPERATIONS)
def test_launches_are_those_of_python(name: str, library: Library, installed: Path) -> None:
    """Programs, threads, shared memory, and every parameter in the size the machine code has."""
    call = next(c for c in calls(4096, 4096, 128, "bfloat16", 90) if c.name == name)
    from sculpt_kernels.aot.pack import Variant

    folder = installed / "share/sculpt_kernels/aot"
    variants = [Variant.of(x.kernel, x.arguments, x.options, 90) for x in call.launches]
    for variant in variants:
        sizes = parameter_sizes(folder / f"{variant.key}.cubin")
        library.cuda.fake_expect((ctypes.c_int * len(sizes))(*sizes), len(sizes))
    places = {
        X.untyped_storage()._cdata: 0x1000 * (i + 1) for i, X in enumerate(call.tensors.values())
    }
    workspace = 0x100000
    assert library.run(name, list(places.values()), workspace) == ""
    log = library.log()
    inside = set()
    for launch, variant in zip(call.launches, variants, strict=True):
        programs, threads, shared, stream, count = (log.pop(0) for _ in range(5))
        assert (programs, threads, stream) == (
            launch.programs, 32 * launch.options["num_warps"], 77
        )  # fmt: skip
        assert f'"shared": {shared},' in (folder / f"{variant.key}.json").read_text()
        given = [log.pop(0) for _ in range(count)]
        kinds = [(key, kind) for key, kind in variant.signature if kind != "constexpr"]
        assert given[len(kinds) :] == [0, 0]  # scratch memory, which is not used
        for value, (key, kind) in zip(given, kinds, strict=False):
            want = launch.arguments[key]
            if not isinstance(want, torch.Tensor):
                assert value == bits(want, kind), key
            elif want.untyped_storage()._cdata in places:
                assert value == places[want.untyped_storage()._cdata], key
            elif want.numel():
                inside.add((value, value + want.untyped_storage().nbytes()))
    assert log == []
    size = library.aot.sculpt_aot_workspace(name.encode())
    ordered = sorted(inside)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ordered))
    if ordered:
        assert ordered[0][0] == workspace
        assert ordered[-1][1] <= workspace + size
    else:
        assert size == 0


def test_what_is_refused(library: Library) -> None:
    left, update = OPERATIONS
    run, reset = library.run, library.cuda.fake_reset
    assert "operation must be one of this pack; got none" in run("none", [16, 16], 16)
    assert "takes 2 tensors; got 1" in run(left, [16], 16)
    assert "tensor 1 of project_left" in run(left, [16, 0], 16)
    assert "must be aligned to 16 bytes and not null; got 0x18" in run(left, [0x18, 16], 16)
    assert re.search(r"workspace of project_left\S+ must be \d+ bytes", run(left, [16, 16], 0))
    reset(90, NO_CONTEXT, 0)
    assert "a CUDA context must be current" in run(left, [16, 16], 16)
    reset(80, 1, 0)
    message = f"{left} was compiled for sm_90; this device is sm_80"
    assert message in run(left, [16, 16], 16)
    assert library.aot.sculpt_aot_workspace(left.encode()) == -1
    reset(90, 1, FAILS)
    assert "update_kernel failed: a fake error" in run(update, [16] * 5, 0)
    assert library.log() == []


def test_the_list_of_operations(library: Library) -> None:
    arch, found = ctypes.c_int32(), []
    while name := library.aot.sculpt_aot_operation(len(found), ctypes.byref(arch)):
        found.append((name.decode(), arch.value))
    assert found == [(name, 90) for name in OPERATIONS]
    assert library.aot.sculpt_aot_operation(-1, None) is None


def test_the_example(installed: Path, driver: Path, tools: dict[str, str], tmp_path: Path) -> None:
    """It finds the package, compiles, links, and launches; what is launched here does nothing."""
    run(
        tools["cmake"], "-S", ROOT / "native/example", "-B", tmp_path, "-DCMAKE_CXX_FLAGS=-Wall",
        f"-DCMAKE_PREFIX_PATH={installed}", f"-DCUDA_INCLUDE={NVIDIA / 'include'}",
        f"-DCUDA_DRIVER={driver}", "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON",
    )  # fmt: skip
    run(tools["cmake"], "--build", tmp_path)
    environment = os.environ | {"LD_LIBRARY_PATH": str(driver.parent)}
    done = subprocess.run([tmp_path / "project_left"], env=environment, capture_output=True)
    lines = done.stdout.decode().splitlines()
    assert [line.split()[0] for line in lines[:-1]] == ["launched", "launched"]
    assert lines[-1] == f"{4096 * 128} of {4096 * 4096} elements are wrong"


def test_the_headers_are_plain_c(installed: Path, tools: dict[str, str]) -> None:
    for header in (installed / "include/sculpt_kernels").iterdir():
        run(
            tools["g++"], "-x", "c", "-std=c99", "-Wall", "-Wextra", "-Werror", "-fsyntax-only",
            f"-I{installed / 'include'}", header,
        )  # fmt: skip


def test_without_a_driver(installed: Path) -> None:
    """The symbols of the library resolve without one, and the first call says what is missing."""
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    library = next(installed.glob("lib*/libsculpt_aot.so"))
    code = (
        "import ctypes, os, sys\n"
        "aot = ctypes.CDLL(sys.argv[1], mode=os.RTLD_NOW)\n"
        "aot.sculpt_aot_error.restype = ctypes.c_char_p\n"
        "assert aot.sculpt_aot_run(b'x', None, 0, 0, None) == 1\n"
        "print(aot.sculpt_aot_error().decode())\n"
    )
    assert "there is no CUDA driver: libcuda.so.1" in run(sys.executable, "-c", code, library)
