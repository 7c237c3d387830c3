"""The examples, run as their first lines say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--cpu", "--num_processes", "2"]
slow = pytest.mark.slow


def run(*command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("options", [["--shard"], pytest.param([], marks=slow)])
def test_several_processes(options, tmp_path):
    out = tmp_path / "out"
    said = run(*TORCHRUN, "examples/several_processes.py", "--out", str(out), *options)
    assert said.count("The constraint holds") == 2
    assert (out / "config.json").exists()
    assert list(out.glob("*.safetensors"))


@pytest.mark.parametrize(
    "launcher", [pytest.param(TORCHRUN, marks=slow), ACCELERATE], ids=["torchrun", "accelerate"]
)
def test_trainer(launcher, tmp_path):
    said = run(*launcher, "examples/trainer.py", "--out", str(tmp_path))
    assert said.count("The constraint holds") == 2
    assert (tmp_path / "first" / "certificate.json").exists()
    assert list((tmp_path / "model").glob("*.safetensors"))
