"""Wheels: pure Python unless the native part is asked for, and whole without a compiler."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BUILD = "import sys; from scikit_build_core.build import build_{0} as b; b(sys.argv[1])"
# Beside the packages and `native`.
OF_SOURCES = {
    "CHANGELOG.md", "CITATION.cff", "CMakeLists.txt", "LICENSE", "PKG-INFO", "README.md",
    "pyproject.toml",
}  # fmt: skip

pytest.importorskip("scikit_build_core")


def build(what: str, folder: Path, source: Path, **environment: str) -> str:
    """What the build of a `wheel` or an `sdist` of `source` in `folder` said."""
    settings = os.environ | environment
    settings["PATH"] = str(Path(sys.executable).parent) + os.pathsep + settings["PATH"]
    done = subprocess.run(
        [sys.executable, "-c", BUILD.format(what), str(folder)], cwd=source, env=settings,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def wheel(folder: Path, source: Path = ROOT, **environment: str) -> tuple[str, set[str], str]:
    """Name and files of the wheel that is built, and what the build said."""
    said = build("wheel", folder, source, **environment)
    (made,) = folder.glob("*.whl")
    with zipfile.ZipFile(made) as archive:
        return made.name, set(archive.namelist()), said


def unpacked_sources(folder: Path) -> Path:
    """The folder with what is in the source distribution."""
    build("sdist", folder, ROOT)
    (made,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(made, folder)
    return folder / made.name.removesuffix(".tar.gz")


def installed(folder: Path, name: str) -> Callable[..., str]:
    """What commands say in a new environment that has the wheel `name` of `folder` installed."""
    venv = folder / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python")]
    options = ["--no-index", "--no-deps", "--quiet"]
    subprocess.run([*pip, "install", *options, str(folder / name)], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    # What it needs is here already; the editable installation beside it is not followed.
    (site / "needed.pth").write_text(str(Path(torch.__file__).parent.parent))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(command: str, *arguments: str) -> str:
        done = subprocess.run(
            [str(venv / "bin" / command), *arguments], cwd=folder, env=environment,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def sources() -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for package in ("sculpt", "sculpt_kernels")
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".j2", ".typed")
    }


def test_the_default_wheel_is_pure(tmp_path: Path) -> None:
    name, files, _ = wheel(tmp_path)
    assert name == f"sculpt_kernels-{PROJECT['version']}-py3-none-any.whl"
    assert {file for file in files if ".dist-info/" not in file} == sources()


def test_the_source_distribution_has_what_wheels_are_made_of(tmp_path: Path) -> None:
    there = unpacked_sources(tmp_path)
    assert there.name == f"sculpt_kernels-{PROJECT['version']}"
    native = {str(p.relative_to(ROOT)) for p in (ROOT / "native").rglob("*") if p.is_file()}
    files = {str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()}
    assert files == sources() | native | OF_SOURCES
    _, of_wheel, _ = wheel(tmp_path, there)
    assert {file for file in of_wheel if ".dist-info/" not in file} == sources()


def test_without_a_compiler_the_package_is_pure_and_says_so(tmp_path: Path) -> None:
    compilers = {"CC": "/nowhere/cc", "CXX": "/nowhere/c++"}
    name, files, said = wheel(tmp_path, SCULPT_NATIVE="1", **compilers)
    assert name.endswith("-py3-none-any.whl")
    assert sources() <= files
    assert said.rstrip().endswith("native part: not built, see above; the package works without it")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_the_native_part_on_request(tmp_path: Path) -> None:
    name, files, _ = wheel(tmp_path, unpacked_sources(tmp_path), SCULPT_NATIVE="1")
    assert "-py3-none-" in name
    assert not name.endswith("-any.whl")
    assert "sculpt_kernels/libsculpt_cpu.so" in files
    run = installed(tmp_path, name)
    code = "import sculpt_kernels as k; print(k.__file__, k.backends()['native'])"
    said = run("python", "-c", code)
    assert said.startswith(str(tmp_path / "venv"))
    assert said.endswith("available\n")


@pytest.mark.slow
def test_an_installed_wheel_works_without_the_sources(tmp_path: Path) -> None:
    name, _, _ = wheel(tmp_path)
    run = installed(tmp_path, name)
    code = "import sculpt; from sculpt_kernels import project_; print(sculpt.__file__)"
    assert run("python", "-c", code).startswith(str(tmp_path / "venv"))
    found = json.loads(run("sculpt", "doctor", "--json"))
    assert found["packages"]["sculpt-kernels"] == PROJECT["version"]
    assert found["conflict"] is None


# As `pip install` wants it, over the end of a line too.
OURS = re.compile(r"\bsculpt-kernels\[([^\]]*)\]")
ANOTHERS = re.compile(r"\bpip install\s+(?:-\S+\s+)*['\"]?sculpt(?!-kernels)\b")


def test_what_users_are_told_to_install_exists() -> None:
    extras = PROJECT["optional-dependencies"].keys()
    told: set[str] = set()
    folders = (ROOT / name for name in ("sculpt", "sculpt_kernels", "docs", "bench", "examples"))
    inside = (path for folder in folders for path in folder.rglob("*"))
    for path in (*ROOT.glob("*.md"), *inside):
        if path.suffix in (".py", ".md"):
            text = path.read_text(encoding="utf-8")
            assert not ANOTHERS.search(text), f"{path.name}: another project on PyPI"
            for names in OURS.findall(text):
                told |= set(names.split(","))
    assert {"demo", "trainer", "triton", "trl"} <= told <= extras
    assert ANOTHERS.search("pip install\n'sculpt[demo]'")
    assert not ANOTHERS.search("pip install 'sculpt-kernels[demo]'")


def test_name_and_version_agree_everywhere() -> None:
    import sculpt

    version = PROJECT["version"]
    assert (sculpt.__distribution__, sculpt.__version__) == (PROJECT["name"], version)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f" VERSION {version} " in (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
