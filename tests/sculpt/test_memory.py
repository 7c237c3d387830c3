"""Peak memory and optimizer bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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


MEASURE = """
import sys
from pathlib import Path
from sculpt.certificate.disk import verify_checkpoints
from sculpt.config import SculptConfig
from sculpt.memory import peak_memory_bytes, reset_peak_memory
reset_peak_memory()
before, after = map(Path, sys.argv[1:])
found = verify_checkpoints(before, after, SculptConfig(unfreeze_rank_ratio=0.25))
print(len(found.certificate.rows), peak_memory_bytes())
"""


def write_checkpoints(folder: Path, layers: int) -> int:
    """Two of `layers` matrices each, tall and wide in turn, all of them changed; bytes of both."""
    for name in ("before", "after"):
        (folder / name).mkdir(parents=True)
    files, total = {}, 0
    for layer in range(layers):
        shape = (16384, 128) if layer % 2 else (128, 16384)
        name, file = f"layers.{layer}.weight", f"model-{layer:05d}.safetensors"
        generator = torch.Generator().manual_seed(layer)
        for where in ("before", "after"):
            W = torch.randn(shape, generator=generator)
            save_file({name: W}, folder / where / file)
            total += W.nbytes
        files[name] = file
    index = json.dumps({"metadata": {"total_size": total // 2}, "weight_map": files})
    for where in ("before", "after"):
        (folder / where / "model.safetensors.index.json").write_text(index)
    return total


def test_memory_of_verify_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    peaks, sizes = [], []
    for layers in (4, 24):
        folder = tmp_path / str(layers)
        sizes.append(write_checkpoints(folder, layers))
        command = [sys.executable, "-c", MEASURE, str(folder / "before"), str(folder / "after")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows, peak = map(int, done.stdout.split())
        assert rows == layers
        peaks.append(peak)
    # An allocator keeps some of what was freed, but not what the files grew by, 320 MiB.
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 4
