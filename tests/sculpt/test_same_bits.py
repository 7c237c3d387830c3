"""The bits of a list of runs are those that were noted, or at least the same twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.sculpt.same_bits import NOTED, RUNS


def digests() -> dict[str, Any]:
    root = Path(__file__).parents[2]
    paths = [root, root / "tests" / "sculpt", root / "tests" / "sculpt" / "distributed"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.sculpt.same_bits"],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def found() -> tuple[dict[str, Any], dict[str, Any]]:
    """Digests by run, and those that were noted on such a machine, or of a second time."""
    first = digests()
    noted = json.loads(NOTED.read_text(encoding="utf-8")).get(first["machine"])
    return first["runs"], noted or digests()["runs"]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_the_same_bits(name, found):
    ours, expected = found
    assert ours[name] == expected[name]
