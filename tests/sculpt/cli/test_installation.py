"""Another project's `sculpt` in the place of ours is refused by modules and by the command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sculpt.cli import doctor
from sculpt.cli.app import app
from sculpt.cli.common import TROUBLE

ROOT = Path(__file__).resolve().parents[3]
SITE = Path(torch.__file__).parent.parent
# The files of `sculpt` on PyPI; the first two replace ours, and its uninstallation removes them.
OTHERS = {
    "__init__.py": "from .sculptor import Sculptor\n",
    "sculptor.py": "class Sculptor:\n    pass\n",
}
REMEDY = "run `pip uninstall sculpt sculpt-kernels`, then install sculpt-kernels again"
MODULES = ("config", "trainer", "runs.start", "task.targets", "task.engines", "inspection.estimate")


@pytest.fixture(params=["installed after ours", "removed again"])
def replaced(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with `sculpt` and `sculpt_kernels`, some files of the former another project's."""
    for name in ("sculpt", "sculpt_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in OTHERS.items():
        if request.param == "removed again":
            (tmp_path / "sculpt" / name).unlink()
        else:
            (tmp_path / "sculpt" / name).write_text(text, encoding="utf-8")
    return tmp_path


def python(folder: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    # -S: an editable installation would be found before the folder.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(folder), str(SITE)))}
    command = [sys.executable, "-S", "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_modules_refuse_another_package(replaced: Path) -> None:
    code = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module("sculpt." + name)
    except ImportError as error:
        print(name, error)
"""
    done = python(replaced, code, *MODULES)
    said = done.stdout.splitlines()
    assert [line.split()[0] for line in said] == list(MODULES), done.stderr
    for line in said:
        assert str(replaced / "sculpt") in line
        assert line.endswith(REMEDY)


@pytest.mark.parametrize("argument", ["doctor", "--version"])
def test_the_command_refuses_another_package(replaced: Path, argument: str) -> None:
    done = python(replaced, "from sculpt.cli.app import app; app()", argument)
    assert done.returncode == TROUBLE
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the package `sculpt` that was imported, ")
    assert line.endswith(REMEDY)


def test_doctor_reports_another_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "OPERATIONS", {})
    monkeypatch.setattr(doctor, "CHOOSING", {})
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.diagnose().conflict is None
    metadata = tmp_path / "sculpt-0.1.35.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: sculpt\nVersion: 0.1.35\n")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "distribution `sculpt` 0.1.35 is installed too" in " ".join(result.output.split())
    assert "computes what it should" not in result.output
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)
    assert found["ok"] is False
    assert found["conflict"].endswith(REMEDY + ".")
