"""The set-up: when it does nothing, and what it does after a kill or a failure."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "tools" / "bootstrap.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bootstrap = load()


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The set-up of a small project; `setup.calls` are the commands it has run.

    A command fails where it contains `setup.fails`, and says `setup.said`.
    """
    (tmp_path / "pyproject.toml").write_text("[project]\n", encoding="utf-8")
    (tmp_path / "constraints.txt").write_text(
        "numpy==1.0\ntorch==2.13.0\ntriton==3.9.0\n", encoding="utf-8"
    )
    setup = bootstrap.Setup(tmp_path)
    setup.gpu, setup.calls, setup.fails, setup.said = False, [], None, ""

    def call(*command: str) -> None:
        setup.calls.append(command)
        if "venv" in command:
            setup.python.parent.mkdir(parents=True)
            setup.python.symlink_to(sys.executable)
        if setup.fails is not None and setup.fails in command:
            raise bootstrap.SetupError(setup.said)

    monkeypatch.setattr(setup, "call", call)
    return setup


def again(setup: Any) -> str:
    """What one more run of the set-up makes."""
    setup.calls.clear()
    setup.run()
    words = [command[-1] for command in setup.calls]
    return "everything" if str(setup.venv) in words else "packages" if words else "nothing"


def append(path: Path) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("# changed\n")


CHANGES = {
    "nothing": (lambda s: None, "nothing"),
    "pyproject.toml": (lambda s: append(s.root / "pyproject.toml"), "packages"),
    "constraints.txt": (lambda s: append(s.root / "constraints.txt"), "packages"),
    "stamp": (lambda s: os.truncate(s.stamp, 20), "everything"),
    "python": (lambda s: s.python.unlink(), "everything"),
    "gpu": (lambda s: setattr(s, "gpu", True), "everything"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_fit_is_made_again(setup: Any, change: str) -> None:
    assert again(setup) == "everything"
    make, expected = CHANGES[change]
    make(setup)
    assert again(setup) == expected
    assert again(setup) == "nothing"


def test_another_python_or_folder_makes_everything_again(
    setup: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.run()
    monkeypatch.setattr(sys, "version", "3.99")
    assert again(setup) == "everything"
    elsewhere = setup.root.with_name("elsewhere")
    setup.root.rename(elsewhere)
    moved = bootstrap.Setup(elsewhere)
    assert moved.noted()["venv"] != moved.description()["venv"]


def test_a_failed_install_keeps_what_is_there(setup: Any) -> None:
    setup.fails, setup.said = "-r", "no matching distribution"
    with pytest.raises(bootstrap.SetupError, match="no matching"):
        setup.run()
    setup.fails = None
    assert again(setup) == "packages"


def test_a_killed_install_starts_from_nothing(setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(setup, "install", killed)
        with pytest.raises(KeyboardInterrupt):
            setup.run()
    assert again(setup) == "everything"


linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has two builds of torch")


@linux
def test_cpu_build_first_and_the_pinned_triton_with_it(setup: Any) -> None:
    setup.run()
    assert setup.calls[1][-1] == "torch==2.13.0+cpu"
    assert all(str(setup.constraints) in call for call in setup.calls[2:])


@linux
@pytest.mark.parametrize("gpu", [True, False])
def test_plain_build_where_there_is_a_gpu_or_no_cpu_build(setup: Any, gpu: bool) -> None:
    setup.gpu, setup.fails = gpu, "torch==2.13.0+cpu"
    setup.said = "ERROR: No matching distribution found for torch==2.13.0+cpu"
    setup.run()
    assert any(setup.fails in call for call in setup.calls) is not gpu
    assert any("torch" in call for call in setup.calls)
    # CUDA torch asks for its own triton: the pin would contradict it.
    used = Path(setup.calls[-1][setup.calls[-1].index("-c") + 1]).read_text(encoding="utf-8")
    assert used == "numpy==1.0\ntorch==2.13.0\n"


@linux
def test_no_second_try_where_something_else_is_wrong(setup: Any) -> None:
    setup.fails, setup.said = "torch==2.13.0+cpu", "No space left on device"
    with pytest.raises(bootstrap.SetupError, match="No space left"):
        setup.run()
    assert len(setup.calls) == 2


def test_a_failure_shows_what_was_said_last(tmp_path: Path) -> None:
    setup = bootstrap.Setup(tmp_path)
    setup.log.parent.mkdir()
    code = "import sys; print('some', 'reason'); sys.exit(1)"
    with pytest.raises(bootstrap.SetupError, match=r"(?s)failed.*set-up\.log.*some reason"):
        setup.call(sys.executable, "-c", code)


def test_an_old_python_is_told_so(monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 8, 10))
    assert bootstrap.main() == 1
    assert "3.11 or newer is needed" in capsys.readouterr().err


def test_make_refuses_a_python_that_is_too_old(tmp_path: Path) -> None:
    old = tmp_path / "python3.8"
    old.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    old.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    command = ["make", "setup", f"PYTHON={old}"]
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert made.returncode != 0
    assert f"{old} is not Python 3.11 or newer" in made.stderr


def test_every_requirement_is_pinned_within_its_range() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (only,) = pin.specifier
            assert only.operator == "=="
            pins[canonicalize_name(pin.name)] = only.version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = project["project"]["dependencies"] + project["build-system"]["requires"]
    for extra in project["project"]["optional-dependencies"].values():
        wanted += extra
    for requirement in map(Requirement, wanted):
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(version), f"{requirement}: pinned to {version}"
