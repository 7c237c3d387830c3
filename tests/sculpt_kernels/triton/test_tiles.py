"""The table of tile configurations and the rule that prunes it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sculpt_kernels.triton import tiles

DEVICES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]


@pytest.mark.parametrize("kernel", sorted({kernel for kernel, _ in tiles.TABLE}))
@pytest.mark.parametrize("capability", DEVICES)
def test_every_kernel_has_a_configuration_on_every_device(
    kernel: str, capability: tuple[int, int]
) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if (kernel, dtype.itemsize == 2) in tiles.TABLE:
            chosen = tiles.choose(kernel, dtype, capability)
            assert chosen.shared_bytes(dtype.itemsize) <= tiles.shared_limit(capability)
            assert capability >= chosen.since


@pytest.mark.parametrize(("key", "entries"), tiles.TABLE.items(), ids=str)
def test_tiles_are_what_the_kernels_can_take(
    key: tuple[str, bool], entries: tuple[tiles.TileConfig, ...]
) -> None:
    for entry in entries:
        for size in (entry.block_m, entry.block_n, entry.block_k):
            assert size >= 16
            assert size & (size - 1) == 0
        # One Philox call serves eight columns of a part of the epilogue.
        assert entry.block_n % (8 * entry.subtiles) == 0
        assert any(tiles.fits(entry, 2 if key[1] else 4, device) for device in DEVICES)


def test_what_does_not_fit_is_pruned() -> None:
    fine = tiles.TileConfig(128, 128, 64, warps=8, stages=3)
    assert tiles.fits(fine, 2, (9, 0))
    assert not tiles.fits(replace(fine, stages=8), 2, (9, 0)), "shared memory"
    assert not tiles.fits(fine, 4, (8, 6)), "shared memory of a small device"
    assert not tiles.fits(replace(fine, block_n=256, warps=4), 2, (9, 0)), "accumulator"
    assert not tiles.fits(replace(fine, maxnreg=96), 2, (9, 0)), "accumulator under a cap"
    assert not tiles.fits(replace(fine, since=(10, 0)), 2, (9, 0)), "device too old"


def test_projected_adamw_runs_twice_on_a_multiprocessor() -> None:
    for capability in ((8, 0), (9, 0), (10, 0)):
        for kernel in ("adamw", "adamw both"):
            chosen = tiles.choose(kernel, torch.bfloat16, capability)
            assert chosen.maxnreg is not None
            assert 2 * 32 * chosen.warps * chosen.maxnreg <= 65536
            assert 2 * chosen.shared_bytes(2) <= tiles.shared_limit(capability)


def test_ranks_are_padded_to_powers_of_two() -> None:
    ranks = (0, 1, 15, 16, 17, 64, 100, 128)
    assert [tiles.padded_rank(rank) for rank in ranks] == [16, 16, 16, 16, 32, 64, 128, 128]


def test_no_configuration_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    big = tiles.TileConfig(256, 256, 128, warps=8, stages=4)
    monkeypatch.setitem(tiles.TABLE, ("update", True), (big,))
    with pytest.raises(ValueError, match=r"compute capability \(9, 0\); got 'update', bfloat16"):
        tiles.choose("update", torch.bfloat16, (9, 0))


def test_importing_the_kernels_package_imports_no_triton() -> None:
    code = "import sys, sculpt_kernels.triton.tiles; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_is_tuned_by_trial() -> None:
    """A trial on an operand that is updated in place would apply the update once more."""
    package = Path(tiles.__file__).parents[1]
    sources = {str(path): path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    assert any("@triton.jit" in source for source in sources.values())
    for name, source in sources.items():
        assert "autotune(" not in source, name
