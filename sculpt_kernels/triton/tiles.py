"""Tile configurations: a plain table, and the rule that says which of them a device can run.

No autotuning: trying configurations on an operand that is updated in place applies the update once
per trial. The first entry that fits the device is used, so the order is the preference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Programs of a launch that keep a large GPU busy: two for each of 132 multiprocessors.
BUSY_PROGRAMS = 264

# Shared memory that one program may use, in bytes, by compute capability (CUDA programming guide).
_SHARED_BYTES = {
    (8, 0): 163 * 1024,
    (8, 6): 99 * 1024,
    (8, 7): 163 * 1024,
    (8, 9): 99 * 1024,
    (9, 0): 227 * 1024,
    (10, 0): 227 * 1024,
    (10, 3): 227 * 1024,
    (12, 0): 99 * 1024,
}
_REGISTERS = 65536
_REGISTERS_PER_THREAD = 255


@dataclass(frozen=True)
class TileConfig:
    """Tile sizes and launch options of one kernel.

    `block_k` is the step along the contracted dimension, `group_m` the rows of tiles that are
    visited together so that their operands stay in L2, `subtiles` the column parts in which the
    epilogue runs, `maxnreg` a cap on registers per thread, `since` the oldest compute capability.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 8
    subtiles: int = 1
    maxnreg: int | None = None
    since: tuple[int, int] = (8, 0)

    def shared_bytes(self, element_size: int) -> int:
        """Operand tiles in flight, or the accumulator while the epilogue rearranges it."""
        operands = (self.block_m + self.block_n) * self.block_k * element_size * self.stages
        epilogue = self.block_m * self.block_n // self.subtiles * 4
        return max(operands, epilogue)

    def accumulator_registers(self) -> int:
        """Registers per thread that hold the float32 accumulator."""
        return self.block_m * self.block_n // (32 * self.warps)

    def options(self) -> dict[str, int | bool]:
        """Launch options in Triton's words; the default of fusion differs between its versions."""
        options: dict[str, int | bool] = {
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": True,
        }
        if self.maxnreg is not None:
            options["maxnreg"] = self.maxnreg
        return options

    def sizes(self) -> dict[str, int]:
        """Tile sizes in the names of the kernels' arguments."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP_M": self.group_m,
            "SUBTILES": self.subtiles,
        }


# Keyed by kernel and by whether the operands have 16-bit elements. In `reduce` block_n is the
# padded rank at most and block_k the step along a row of `G`; in `apply` block_n is that step, and
# block_k the padded ranks at most.
TABLE: dict[tuple[str, bool], tuple[TileConfig, ...]] = {
    ("update", True): (
        TileConfig(128, 128, 64, warps=8, stages=3),
        TileConfig(128, 128, 32, warps=8, stages=3),
        TileConfig(64, 64, 32, warps=4, stages=3),
    ),
    ("update", False): (TileConfig(64, 64, 16, warps=4, stages=3),),
    # Half the registers and less than half the shared memory of a multiprocessor: two programs
    # share it, and the GEMM of one hides under the memory traffic of the other's epilogue.
    ("adamw", True): (
        TileConfig(128, 128, 64, warps=8, stages=3, subtiles=8, maxnreg=128, since=(9, 0)),
        TileConfig(64, 128, 32, warps=8, stages=3, subtiles=4, maxnreg=128),
    ),
    ("adamw both", True): (
        TileConfig(128, 128, 32, warps=8, stages=4, subtiles=8, maxnreg=128, since=(9, 0)),
        TileConfig(64, 128, 32, warps=8, stages=3, subtiles=4, maxnreg=128),
    ),
    ("adamw", False): (TileConfig(64, 64, 16, warps=4, stages=2, subtiles=2),),
    ("adamw both", False): (TileConfig(64, 64, 16, warps=4, stages=2, subtiles=2),),
    # Nothing is multiplied: block_k has no meaning.
    ("sketch", False): (TileConfig(32, 64, 16, warps=4, stages=1),),
    ("reduce", True): (
        TileConfig(64, 128, 64, warps=8, stages=3),
        TileConfig(64, 128, 32, warps=8, stages=3),
    ),
    ("reduce", False): (TileConfig(32, 128, 16, warps=8, stages=2),),
    ("apply", True): (
        TileConfig(64, 128, 128, warps=8, stages=2),
        TileConfig(64, 64, 128, warps=8, stages=1),
    ),
    # Both sides at once: twice the operands, so half the columns.
    ("apply both", True): (
        TileConfig(64, 64, 256, warps=8, stages=2, since=(9, 0)),
        TileConfig(32, 64, 256, warps=8, stages=1),
    ),
}


def fits(config: TileConfig, element_size: int, capability: tuple[int, int]) -> bool:
    """Whether a device can run `config`: its shared memory, its register file, and no spills."""
    limit = config.maxnreg or _REGISTERS_PER_THREAD
    return (
        capability >= config.since
        and config.shared_bytes(element_size) <= shared_limit(capability)
        and config.warps * 32 * (config.maxnreg or 1) <= _REGISTERS
        # Addresses, operands and the epilogue want about as many registers again.
        and 2 * config.accumulator_registers() <= limit
    )


def shared_limit(capability: tuple[int, int]) -> int:
    """Bytes of shared memory per program; the smallest of its family for an unknown device."""
    return _SHARED_BYTES.get(capability, 99 * 1024)


def choose(kernel: str, dtype: torch.dtype, capability: tuple[int, int]) -> TileConfig:
    """The first configuration of `kernel` for operands of `dtype` that fits the device."""
    for config in TABLE[kernel, dtype.itemsize == 2]:
        if fits(config, dtype.itemsize, capability):
            return config
    raise ValueError(
        f"kernel must have a configuration for compute capability {capability}; "
        f"got {kernel!r}, {str(dtype).removeprefix('torch.')}, of which none fits"
    )


def padded_rank(rank: int) -> int:
    """Columns of a tile that holds `rank` basis vectors: tensor cores want a power of two."""
    return max(16, 1 << (rank - 1).bit_length()) if rank else 16
