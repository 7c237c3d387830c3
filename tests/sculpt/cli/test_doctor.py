"""`sculpt doctor` tests every backend that is there, and says what is wrong."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import sculpt_kernels
from sculpt.cli.app import app
from sculpt.cli.doctor import CHOOSING, OPERATIONS, Check, diagnose


def test_what_is_available_is_tested_and_right():
    found = diagnose()
    assert found.ok
    available = [name for name, state in found.backends.items() if state == "available"]
    assert {check.backend for check in found.checks} == {*available, "auto"}
    tested = [check.operation for check in found.checks if check.backend == "torch"]
    assert tested[: len(OPERATIONS)] == list(OPERATIONS)
    for check in found.checks:
        assert check.skipped or 0 < check.error < 1e-5
    assert found.packages["torch"] == torch.__version__
    assert {check.operation for check in found.checks} == {*OPERATIONS, *CHOOSING}


@pytest.mark.parametrize("defect", ["wrong", "nan", "raises", "not there"])
def test_a_defect_is_reported(defect, monkeypatch):
    right = sculpt_kernels.project

    def project(G, U, V, **options):
        if defect == "raises":
            raise AssertionError("spilled everything")
        if defect == "not there":
            raise RuntimeError("backend='torch' cannot run here: [it] rains")
        result = right(G, U, V, **options)
        result[0, 0] += torch.nan if defect == "nan" else 1e-3
        return result

    monkeypatch.setattr(sculpt_kernels, "project", project)
    result = CliRunner().invoke(app, ["doctor"])
    as_json = CliRunner().invoke(app, ["doctor", "--json"])
    broken = [c for c in json.loads(as_json.output)["checks"] if not c["ok"]]
    if defect == "not there":
        assert result.exit_code == 0
        assert "not there: [it] rains" in result.output
        assert broken == []
        return
    assert result.exit_code == as_json.exit_code == 1
    assert f"{len(broken)} of " in result.output
    assert {check["operation"] for check in broken} == {
        f"project, {form}" for form in ("core", "strict", "left", "right")
    }
    assert ("spilled everything" if defect == "raises" else "WRONG") in result.output


def test_an_error_a_little_above_that_of_plain_torch_passes():
    assert Check("x", "torch", "cpu", error=3e-7, plain=1e-7).ok
    assert not Check("x", "torch", "cpu", error=5e-7, plain=1e-7).ok
