"""Offline compilation of the Triton kernels: what a GPU would run, judged without one.

    python -m sculpt_kernels.compile --arch 80 90 100

Each point calls a launcher on tensors without memory and compiles the launches that it asks for,
with the specialisations a real launch has: divisibility by 16 of addresses and integers, and the
strides that are 1. The bundled disassembler then counts registers, spills, tensor-core instructions
and 16-byte loads. The exit code is 1 if a default configuration spills.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ARCHS = (80, 90, 100)
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
    tile: str
    warps: int
    stages: int
    registers: int
    stack: int
    spills: int
    shared: int
    tensor_core: int
    wide_loads: int


def points() -> list[Point]:
    """Every kernel in its variants, at the default configuration."""
    from sculpt_kernels.coordinates import triton_compress as compress
    from sculpt_kernels.coordinates import triton_expand as expand_add
    from sculpt_kernels.projection import triton as project
    from sculpt_kernels.subspaces import triton_sketch as sketch

    def tensors(m: int, n: int, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        def of(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        return of(m, n), of(m, r), of(n, r)

    def small(form: str) -> Callable[[torch.dtype], Any]:
        def run(dtype: torch.dtype) -> Any:
            G, U, V = tensors(4096, 11008, 128, dtype)
            left, right = U if form != "right" else None, V if form != "left" else None
            return project.project_(G, left, right, form)

        return run

    def many(dtype: torch.dtype) -> None:
        G, U, V = tensors(4096, 4096, 128, dtype)
        project.project_many_([(G, U, V)] * 8, "core")

    def expand(dtype: torch.dtype) -> None:
        W, U, V = tensors(4096, 4096, 1024, dtype)
        C = torch.empty(1024, 1024, device="meta")
        rounding = "nearest" if dtype == torch.float32 else "stochastic"
        seed = None if dtype == torch.float32 else 2**40 + 1
        expand_add.expand_add_(W, C, U, V, 1.0, rounding, seed)

    def expand_many(dtype: torch.dtype) -> None:
        W, U, V = tensors(576, 576, 144, dtype)
        C, seeds = torch.empty(144, 144, device="meta"), torch.zeros(8, dtype=torch.int64)
        expand_add.expand_add_many_(
            [W] * 8, [C] * 8, [U] * 8, [V] * 8, 1.0, "stochastic", seeds.to("meta")
        )

    def adamw(form: str, target: str, **extra: Any) -> Callable[[torch.dtype], Any]:
        return lambda dtype: _adamw(*tensors(4096, 4096, 2048, dtype), form, target, **extra)

    def compressed(dtype: torch.dtype) -> None:
        G, U, V = tensors(4096, 4096, 128, dtype)
        compress.compress(G, U, V, torch.empty(128, 128, device="meta"))

    def sketched(dtype: torch.dtype) -> None:
        sketch.sketch(torch.empty(11008, 128, dtype=dtype, device="meta"), 2**40 + 1, 0)

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
        Point("compress", bf16, compressed),
        Point("sketch", fp32, sketched),
        Point("sketch", torch.float64, sketched),
        Point("expand_add_ stochastic", bf16, expand),
        Point("expand_add_ stochastic", fp16, expand),
        Point("expand_add_many_ stochastic", bf16, expand_many),
        Point("project_adamw_ update", bf16, adamw("core", "update")),
        Point("project_adamw_ gradient", bf16, adamw("core", "gradient")),
        Point("project_adamw_ strict", bf16, adamw("strict", "gradient")),
        Point("project_adamw_ gradient", fp32, adamw("core", "gradient", copy=False)),
        Point("project_adamw_ strict", fp32, adamw("strict", "gradient", copy=False)),
    ]


def _adamw(G: Tensor, U: Tensor, V: Tensor, form: str, target: str, copy: bool = True) -> None:
    from sculpt_kernels.adamw import triton as adamw

    W, first, second = (torch.empty(G.shape, device="meta") for _ in range(3))
    adamw.project_adamw_(
        W,
        G,
        first,
        second,
        U,
        V,
        form=form,
        project=target,
        lr=1e-5,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.1,
        step=1,
        copy=torch.empty_like(G) if copy else None,
    )


def compile_point(point: Point, arch: int) -> list[Row]:
    """Compile the launches of one point for one architecture; equal kernels are compiled once."""
    from sculpt_kernels.triton import launcher

    previous = launcher.target_capability
    launcher.target_capability = divmod(arch, 10)
    try:
        with launcher.record() as launches:
            point.run(point.dtype)
    finally:
        launcher.target_capability = previous
    return [_compile(point, launch, arch) for launch in launches]


def _compile(point: Point, launch: Any, arch: int) -> Row:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = specialize(launch.kernel, launch.arguments)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    registers, stack, sass = _disassemble(compiled.asm["cubin"])
    arguments = launch.arguments
    blocks = [str(arguments[key]) for key in arguments if key.startswith("BLOCK_")]
    return Row(
        point=point.name,
        kernel=launch.kernel.fn.__name__,
        dtype=str(point.dtype).removeprefix("torch."),
        arch=arch,
        tile="x".join(blocks),
        warps=launch.options["num_warps"],
        stages=launch.options["num_stages"],
        registers=registers,
        stack=stack,
        spills=len(_SPILL.findall(sass)),
        shared=compiled.metadata.shared,
        tensor_core=len(_TENSOR_CORE.findall(sass)),
        wide_loads=len(_WIDE_LOAD.findall(sass)),
    )


def specialize(
    kernel: Any, arguments: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Signature, constants and attributes of a launch, as Triton derives them."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        fixed = parameter.do_not_specialize
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and not fixed):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = _type_of(value)
        divisible = value.data_ptr() if isinstance(value, Tensor) else value
        if not fixed and isinstance(divisible, int) and divisible % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        names |= {torch.int64: "i64", torch.float64: "fp64"}
        return f"*{names[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


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


_HEADER = (
    f"{'point':31} {'kernel':17} {'dtype':9} {'sm':>4} {'tile':>12} {'w':>2} {'s':>2} "
    f"{'regs':>4} {'stack':>5} {'spills':>6} {'shared':>7} {'mma':>4} {'128b':>4}"
)


def _line(row: Row) -> str:
    return (
        f"{row.point:31} {row.kernel:17} {row.dtype:9} {row.arch:4} {row.tile:>12} {row.warps:2} "
        f"{row.stages:2} {row.registers:4} {row.stack:5} {row.spills:6} {row.shared:7} "
        f"{row.tensor_core:4} {row.wide_loads:4}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sculpt_kernels.compile", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHS), help="80 90 100 ...")
    parser.add_argument("--only", default="", help="points whose name contains this")
    parser.add_argument("--dtype", default="", help="points of this dtype: bfloat16, ...")
    parser.add_argument("--json", action="store_true", help="rows as JSON instead of a table")
    options = parser.parse_args(arguments)
    if not options.json:
        print(_HEADER)
    rows = []
    for arch in options.arch:
        for point in points():
            if options.only not in point.name or options.dtype not in str(point.dtype):
                continue
            for row in compile_point(point, arch):
                rows.append(row)
                if not options.json:
                    print(_line(row), flush=True)
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
    return int(any(row.spills or row.stack for row in rows))


if __name__ == "__main__":
    sys.exit(main())
