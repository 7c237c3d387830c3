"""The set-up: when it does nothing, what it does after a kill, and how it explains a failure."""

from __future__ import annotations

import importlib.util
import json
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


class FakePip:
    """Stands in for pip: records what is asked for, fails where told, and leaves a torch behind."""

    def __init__(self, setup: Any, fails: dict[str, str] | None = None, leaves: str = "") -> None:
        self.setup = setup
        self.fails = fails or {}
        self.leaves = leaves
        self.calls: list[tuple[str, ...]] = []

    def __call__(self, *arguments: str, command: str = "install") -> None:
        self.calls.append(arguments if command == "install" else (command, *arguments))
        for word, said in self.fails.items():
            if word in arguments:
                self.setup.log.write_text(said, encoding="utf-8")
                raise bootstrap.SetupError(bootstrap.explain(said, Path("pip.log")))
        if self.leaves and arguments[-1].startswith("torch=="):
            site = self.setup.venv / "lib" / "python3.11" / "site-packages"
            (site / f"torch-{self.leaves}.dist-info").mkdir(parents=True, exist_ok=True)


@pytest.fixture
def setup(tmp_path: Path) -> Any:
    """The set-up of a small project whose .venv is already there, nothing installed in it."""
    (tmp_path / "pyproject.toml").write_text("[project]\n", encoding="utf-8")
    (tmp_path / "constraints.txt").write_text(
        "numpy==1.0\ntorch==2.13.0\ntriton==3.9.0\n", encoding="utf-8"
    )
    setup = bootstrap.Setup(tmp_path)
    setup.has_gpu = False
    setup.python.parent.mkdir(parents=True, exist_ok=True)
    setup.python.symlink_to(sys.executable)
    version = ".".join(str(n) for n in sys.version_info[:3])
    (setup.venv / "pyvenv.cfg").write_text(f"version = {version}\n", encoding="utf-8")
    return setup


NOT_THERE = "ERROR: No matching distribution found for {}\n"
UNREACHABLE = "WARNING: Retrying (Retry(total=2)) after connection broken by 'NewConnectionError'\n"


def test_does_nothing_the_second_time(setup: Any) -> None:
    setup.pip = FakePip(setup, leaves="2.13.0+cpu")
    setup.run()
    assert setup.ready()
    done = len(setup.pip.calls)
    setup.run()
    assert len(setup.pip.calls) == done > 0


def test_what_has_the_same_import_name_is_removed_first(setup: Any) -> None:
    (setup.venv / "lib/python3.11/site-packages/sculpt-0.1.35.dist-info").mkdir(parents=True)
    setup.pip = FakePip(setup, leaves="2.13.0+cpu")
    setup.run()
    assert setup.pip.calls[-2] == ("uninstall", "sculpt")
    assert setup.pip.calls[-1][-2] == "-e"


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_a_changed_requirement_is_installed(setup: Any, changed: str) -> None:
    setup.pip = FakePip(setup, leaves="2.13.0+cpu")
    setup.run()
    with (setup.root / changed).open("a") as file:
        file.write("# changed\n")
    assert not setup.ready()


def test_a_damaged_stamp_or_another_folder_is_not_ready(setup: Any) -> None:
    setup.pip = FakePip(setup, leaves="2.13.0+cpu")
    setup.run()
    stamp = setup.stamp.read_text(encoding="utf-8")
    setup.stamp.write_text(stamp[: len(stamp) // 2], encoding="utf-8")
    assert not setup.ready()
    setup.stamp.write_text(json.dumps(json.loads(stamp) | {"folder": "elsewhere"}))
    assert not setup.ready()
    assert setup.reason_to_replace() == "the one here was moved"
    setup.stamp.write_text(json.dumps(json.loads(stamp) | {"gpu": True}))
    assert not setup.ready()
    assert setup.reason_to_replace() == "a GPU came or went"


def test_a_failed_install_leaves_no_stamp_and_keeps_what_is_there(setup: Any) -> None:
    setup.pip = FakePip(setup, fails={"-r": NOT_THERE.format("hatchling==1.0")})
    with pytest.raises(bootstrap.SetupError, match=r"could not install hatchling==1\.0"):
        setup.run()
    assert not setup.ready()
    assert not setup.under_way.exists()
    assert setup.reason_to_replace() is None


def test_a_killed_install_starts_from_an_empty_venv(setup: Any) -> None:
    def killed(*arguments: str) -> None:
        raise KeyboardInterrupt

    setup.pip = killed
    with pytest.raises(KeyboardInterrupt):
        setup.run()
    assert not setup.ready()
    assert setup.reason_to_replace() == "the last set-up was stopped half-way"


def test_a_venv_of_another_python_or_a_broken_one_is_replaced(setup: Any) -> None:
    (setup.venv / "pyvenv.cfg").write_text("version = 3.8.1\n", encoding="utf-8")
    assert setup.reason_to_replace() == "the one here is of another Python"
    version = ".".join(str(n) for n in sys.version_info[:3])
    (setup.venv / "pyvenv.cfg").write_text(f"version = {version}\n", encoding="utf-8")
    setup.python.unlink()
    assert setup.reason_to_replace() == "the one here does not work"


linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has two builds of torch")


@linux
def test_cpu_build_first_and_the_pinned_triton_with_it(setup: Any) -> None:
    setup.pip = FakePip(setup, leaves="2.13.0+cpu")
    setup.run()
    assert setup.pip.calls[0][-1] == "torch==2.13.0+cpu"
    assert all(str(setup.constraints) in call for call in setup.pip.calls[1:])


@linux
def test_plain_build_where_there_is_no_cpu_build(
    setup: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = NOT_THERE.format("torch==2.13.0+cpu")
    setup.pip = FakePip(setup, fails={"torch==2.13.0+cpu": missing}, leaves="2.13.0")
    setup.run()
    assert [call[-1] for call in setup.pip.calls[:2]] == ["torch==2.13.0+cpu", "torch==2.13.0"]
    said = [line for line in capsys.readouterr().out.splitlines() if "torch" in line]
    assert len(said) == 1
    assert "taking torch==2.13.0" in said[0]
    # CUDA torch asks for its own triton; the pin would contradict it.
    used = Path(setup.pip.calls[-1][1]).read_text(encoding="utf-8")
    assert used == "numpy==1.0\ntorch==2.13.0\n"


@linux
def test_no_second_try_when_the_index_cannot_be_reached(setup: Any) -> None:
    said = UNREACHABLE + NOT_THERE.format("torch==2.13.0+cpu")
    setup.pip = FakePip(setup, fails={"torch==2.13.0+cpu": said})
    with pytest.raises(bootstrap.SetupError, match="could not reach its package index"):
        setup.run()
    assert len(setup.pip.calls) == 1


def test_plain_build_with_a_gpu(setup: Any) -> None:
    setup.has_gpu = True
    setup.pip = FakePip(setup, leaves="2.13.0")
    setup.run()
    assert setup.pip.calls[0][-1] == "torch==2.13.0"


@pytest.mark.parametrize(
    ("said", "package", "why"),
    [
        (NOT_THERE.format("foo==1.2"), "foo==1.2", "no such version"),
        (UNREACHABLE + NOT_THERE.format("foo"), "foo", "could not reach"),
        ("Collecting foo==1\nERROR: [Errno 28] No space left on device", "foo==1", "disk is"),
        ("Collecting foo>=2 (from bar)\nERROR: Read timed out.", "foo>=2", "could not reach"),
        ("ERROR: Failed building wheel for foo", "foo", "no ready-made build"),
        ("ERROR: Cannot install a, b because these package versions have conflicting dependencies.",
         "a", "different versions"),
        ("Obtaining file:///somewhere\nerror: subprocess-exited-with-error",
         "this project itself", "no ready-made build"),
        ("something new", "the packages", "pip failed"),
    ],
)  # fmt: skip
def test_a_failure_names_the_package_the_reason_and_the_remedy(
    said: str, package: str, why: str
) -> None:
    text = bootstrap.explain(said, Path("pip.log"))
    assert text.startswith(f"could not install {package}: ")
    assert why in text.splitlines()[0]
    assert "what to do: " in text
    assert "pip.log" in text


def test_an_old_python_is_told_so() -> None:
    with pytest.raises(
        bootstrap.SetupError, match=r"python3 is Python 3.8.10.*needs 3.11 or newer"
    ):
        bootstrap.check_python((3, 8, 10), "python3")
    bootstrap.check_python((3, 11, 0), "python3")


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
