"""Peak memory and optimizer bytes."""

from __future__ import annotations

import sys

import pytest
import torch

from sculpt.memory import optimizer_state_bytes, peak_memory_bytes, reset_peak_memory


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is reset on Linux only")
def test_peak_rises_with_what_is_held_and_can_be_reset() -> None:
    reset_peak_memory()
    before = peak_memory_bytes()
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    held = peak_memory_bytes()
    assert held - before > 60 * 2**20
    del block
    assert peak_memory_bytes() > held - 2**20  # the kernel counts in batches
    reset_peak_memory()
    assert peak_memory_bytes() < held - 50 * 2**20


def test_both_moments_are_counted() -> None:
    weight = torch.nn.Parameter(torch.ones(10, 7))
    optimizer = torch.optim.AdamW([weight])
    assert optimizer_state_bytes(optimizer) == 0
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert optimizer_state_bytes(optimizer) == 2 * 70 * 4 + 4
