"""Offline compilation of the Triton kernels: what a GPU would run, judged without one.

Each point calls a launcher on tensors without memory and compiles the launches that it asks for.
The bundled disassembler then counts registers, spills, tensor-core instructions and 16-byte loads.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu_parts.compile import Target

_TENSOR_CORE = re.compile(r"\b(?:HGMMA|HMMA|UTC\w*MMA)\b")
_WIDE_LOAD = re.compile(r"\b(?:LDG(?:\.\w+)*\.128|LDGSTS(?:\.\w+)*\.128)\b|\bUTMALDG\b")
_SPILL = re.compile(r"\b(?:LDL|STL)\b")
_REGISTERS = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True)
class Point:
    """One operation on one set of operands, in the shapes of a 7B model."""

    name: str
    dtype: torch.dtype
    run: Callable[[torch.dtype], Any]


@dataclass(frozen=True)
class Row:
    """What the compiler made of one launch."""

    point: str
    kernel: str
    dtype: str
    arch: int
    warps: int
    registers: int
    stack: int
    spills: int
    shared: int
    tensor_core: int
    wide_loads: int


def points() -> list[Point]:
    """Every kernel in its variants, at the default configuration."""
    from sculpt_kernels.coordinates import triton_compress, triton_expand
    from sculpt_kernels.projection import triton as project
    from sculpt_kernels.subspaces import triton_sketch

    def operands(m: int, n: int, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        return _meta(m, n, dtype=dtype), _meta(m, r, dtype=dtype), _meta(n, r, dtype=dtype)

    def small(form: str) -> Callable[[torch.dtype], Any]:
        def run(dtype: torch.dtype) -> Any:
            G, U, V = operands(4096, 11008, 128, dtype)
            left, right = U if form != "right" else None, V if form != "left" else None
            return project.project_(G, left, right, form)

        return run

    def many(dtype: torch.dtype) -> None:
        project.project_many_([operands(4096, 4096, 128, dtype)] * 8, "core")

    def expand(dtype: torch.dtype) -> None:
        W, U, V = operands(4096, 4096, 1024, dtype)
        triton_expand.expand_add_(W, _meta(1024, 1024), U, V, 1.0, "stochastic", 2**40 + 1)

    def expand_many(dtype: torch.dtype) -> None:
        W, U, V = operands(576, 576, 144, dtype)
        seeds = _meta(8, dtype=torch.int64)
        lists = [W] * 8, [_meta(144, 144)] * 8, [U] * 8, [V] * 8
        triton_expand.expand_add_many_(*lists, 1.0, "stochastic", seeds)

    def adamw(form: str, target: str, copy: bool = True) -> Callable[[torch.dtype], Any]:
        return lambda dtype: _adamw(*operands(4096, 4096, 2048, dtype), form, target, copy)

    def compress(dtype: torch.dtype) -> None:
        triton_compress.compress(*operands(4096, 4096, 128, dtype), _meta(128, 128))

    def sketch(dtype: torch.dtype) -> None:
        triton_sketch.sketch(_meta(11008, 128, dtype=dtype), 2**40 + 1, 0)

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    return [
        Point("project_ core", bf16, small("core")),
        Point("project_ core", fp16, small("core")),
        Point("project_ core", fp32, small("core")),
        Point("project_ left", bf16, small("left")),
        Point("project_ right", bf16, small("right")),
        Point("project_ strict", bf16, small("strict")),
        Point("project_ strict", fp32, small("strict")),
        Point("project_many_ core", bf16, many),
        Point("compress", bf16, compress),
        Point("sketch", fp32, sketch),
        Point("sketch", torch.float64, sketch),
        Point("expand_add_ stochastic", bf16, expand),
        Point("expand_add_ stochastic", fp16, expand),
        Point("expand_add_many_ stochastic", bf16, expand_many),
        Point("project_adamw_ update", bf16, adamw("core", "update")),
        Point("project_adamw_ gradient", bf16, adamw("core", "gradient")),
        Point("project_adamw_ strict", bf16, adamw("strict", "gradient")),
        Point("project_adamw_ gradient", fp32, adamw("core", "gradient", copy=False)),
        Point("project_adamw_ strict", fp32, adamw("strict", "gradient", copy=False)),
    ]


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _adamw(G: Tensor, U: Tensor, V: Tensor, form: str, target: str, copy: bool) -> None:
    from sculpt_kernels.adamw import triton

    W, first, second = (_meta(*G.shape) for _ in range(3))
    triton.project_adamw_(
        W, G, first, second, U, V, form=form, project=target, lr=1e-5, betas=(0.9, 0.999),
        eps=1e-8, weight_decay=0.1, step=1, copy=torch.empty_like(G) if copy else None,
    )  # fmt: skip


@contextmanager
def _compiling_for(arch: int) -> Iterator[None]:
    from triton.runtime.driver import driver

    from sculpt_kernels.triton import launcher

    before = driver._active, launcher.target_capability
    driver._active, launcher.target_capability = Target(arch), divmod(arch, 10)
    try:
        yield
    finally:
        driver._active, launcher.target_capability = before


def compile_point(point: Point, arch: int) -> list[Row]:
    """Compile the launches of one point for one architecture; equal kernels are compiled once."""
    from sculpt_kernels.triton import launcher

    with _compiling_for(arch):
        with launcher.record() as launches:
            point.run(point.dtype)
        return [_compile(point, launch, arch) for launch in launches]


def _compile(point: Point, launch: Any, arch: int) -> Row:
    compiled = launch.kernel.warmup(grid=(1,), **launch.arguments, **launch.options)
    registers, stack, sass = _disassemble(compiled.asm["cubin"])
    return Row(
        point=point.name,
        kernel=launch.kernel.fn.__name__,
        dtype=str(point.dtype).removeprefix("torch."),
        arch=arch,
        warps=launch.options["num_warps"],
        registers=registers,
        stack=stack,
        spills=len(_SPILL.findall(sass)),
        shared=compiled.metadata.shared,
        tensor_core=len(_TENSOR_CORE.findall(sass)),
        wide_loads=len(_WIDE_LOAD.findall(sass)),
    )


def _disassemble(cubin: bytes) -> tuple[int, int, str]:
    """Registers per thread, stack bytes, and the machine code as text."""
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(tools / "cuobjdump", "-res-usage", file.name)
        sass = _run(tools / "nvdisasm", "-c", file.name)
    found = _REGISTERS.search(usage)
    if found is None:
        raise RuntimeError(f"cuobjdump must report register usage; got {usage!r}")
    return int(found[1]), int(found[2]), sass


def _run(tool: Path, *arguments: str) -> str:
    done = subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True)
    return done.stdout
