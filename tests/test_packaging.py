"""Wheels: pure Python unless the native part is asked for, and whole without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = "import sys; from scikit_build_core.build import build_wheel as b; b(sys.argv[1])"

pytest.importorskip("scikit_build_core")


def wheel(folder: Path, **environment: str) -> tuple[str, set[str], str]:
    """Name and files of the wheel that is built, and what the build said."""
    settings = os.environ | environment
    settings["PATH"] = str(Path(sys.executable).parent) + os.pathsep + settings["PATH"]
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)], cwd=ROOT, env=settings, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    (made,) = folder.glob("*.whl")
    with zipfile.ZipFile(made) as archive:
        return made.name, set(archive.namelist()), done.stdout


def sources() -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for package in ("sculpt", "sculpt_kernels")
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".j2", ".typed")
    }


def test_the_default_wheel_is_pure(tmp_path: Path) -> None:
    name, files, _ = wheel(tmp_path)
    assert name.endswith("-py3-none-any.whl")
    assert {file for file in files if ".dist-info/" not in file} == sources()


def test_without_a_compiler_the_package_is_pure_and_says_so(tmp_path: Path) -> None:
    compilers = {"CC": "/nowhere/cc", "CXX": "/nowhere/c++"}
    name, files, said = wheel(tmp_path, SCULPT_NATIVE="1", **compilers)
    assert name.endswith("-py3-none-any.whl")
    assert sources() <= files
    assert said.rstrip().endswith("native part: not built, see above; the package works without it")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_the_native_part_on_request(tmp_path: Path) -> None:
    name, files, _ = wheel(tmp_path, SCULPT_NATIVE="1")
    assert "-py3-none-" in name
    assert not name.endswith("-any.whl")
    assert "sculpt_kernels/libsculpt_cpu.so" in files
    shutil.unpack_archive(next(tmp_path.glob("*.whl")), tmp_path / "there", "zip")
    code = "import sculpt_kernels as k; print(k.__file__, k.backends()['native'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": "there"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert str(tmp_path / "there") in done.stdout
    assert done.stdout.endswith("available\n")
