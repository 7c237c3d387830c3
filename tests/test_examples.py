"""The examples, run as their first lines say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("options", [["--shard"], pytest.param([], marks=pytest.mark.slow)])
def test_several_processes(options, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["2", "examples/several_processes.py", "--out", str(tmp_path / "out"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The constraint holds") == 2
    assert (tmp_path / "out" / "config.json").exists()
    assert list((tmp_path / "out").glob("*.safetensors"))
