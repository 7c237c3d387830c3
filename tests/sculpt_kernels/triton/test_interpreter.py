"""Every kernel against the float64 reference, without a GPU, in Triton's interpreter.

Triton decides when a kernel is decorated whether it will be interpreted, for the whole process, so
the cases in `interpreter/` run in a process of their own. To run some of them by hand:

    TRITON_INTERPRET=1 pytest tests/sculpt_kernels/triton/interpreter -k strict
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the cases run directly")
def test_the_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [*command, str(Path(__file__).parent / "interpreter")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.fail(f"{done.stdout[-8000:]}\n{done.stderr[-4000:]}", pytrace=False)
