"""Steps in a CUDA graph: no value and no copy goes to the host, and none is needed.

The cases in `captured/` have a device without values, and so a process of their own. By hand:

    SCULPT_TEST_CAPTURED=1 pytest tests/sculpt/task/captured
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sculpt import SculptConfig
from tests.sculpt.small_models import begin


def test_a_captured_step_looks_at_no_value():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short"]
    done = subprocess.run(
        [*command, str(Path(__file__).parent / "captured")],
        env=os.environ | {"SCULPT_TEST_CAPTURED": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.fail(f"{done.stdout[-8000:]}\n{done.stderr[-4000:]}", pytrace=False)


@pytest.mark.parametrize("fused", [True, False])
def test_a_captured_step_without_finite_gradients_is_left_out_by_the_optimizer(monkeypatch, fused):
    """On the CPU, where the fused optimizer takes the same flag."""
    monkeypatch.setattr("sculpt.task.attachment.is_captured", lambda optimizer: True)
    torch.manual_seed(0)
    model = nn.Linear(12, 20)
    sculptor, optimizer = begin(model, SculptConfig(), lr=1e-3, weight_decay=0.1, fused=fused)
    (C,) = sculptor.parameters()
    x = torch.randn(6, 12)

    def step(scale: float) -> list[torch.Tensor]:
        optimizer.zero_grad()
        (scale * model(x).square().mean()).backward()
        optimizer.step()
        return [t.clone() for t in (model.weight, C, *optimizer.state[C].values())]

    first, bad = step(1.0), step(float("nan"))
    assert fused == all(torch.equal(a, b) for a, b in zip(first, bad, strict=True))
    assert not hasattr(optimizer, "found_inf")
    if fused:
        assert not torch.equal(step(1.0)[0], first[0])
        optimizer.found_inf = torch.ones(())
        stopped = step(1.0)
        assert torch.equal(stopped[0], step(1.0)[0])
        assert optimizer.found_inf == 1, "a flag that others have set stays theirs"
