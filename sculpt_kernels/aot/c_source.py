"""A pack as C++: machine code, launches and functions as tables that `native/aot` runs.

`include/sculpt_kernels/pack.h` declares one function per operation, `pack.cpp` holds the tables and
takes in the cubins.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sculpt_kernels.aot.calls import Call
from sculpt_kernels.aot.pack import Variant

ALIGN = 256  # of each tensor within the workspace, in bytes


@dataclass(frozen=True)
class Function:
    """One operation on one architecture; `launches` are kernel, programs, and C initialisers."""

    name: str
    formula: str
    tensors: dict[str, Tensor]
    arch: int
    workspace: int
    launches: list[tuple[str, int, list[str]]]

    @classmethod
    def of(cls, call: Call, arch: int, variants: Iterable[Variant]) -> Function:
        places = {_storage(X): i for i, X in enumerate(call.tensors.values())}
        memory: dict[int, int] = {}  # storages that the operation makes itself, and where they go
        size = 0
        launches = []
        for launch, variant in zip(call.launches, variants, strict=True):
            arguments = []
            for name, kind in variant.signature:
                value = launch.arguments[name]
                if kind == "constexpr":
                    continue
                if isinstance(value, Tensor) and _storage(value) not in places:
                    storage = _storage(value)
                    if storage not in memory:
                        memory[storage] = size
                        size += -(-value.untyped_storage().nbytes() // ALIGN) * ALIGN
                    arguments.append(_initializer("WORKSPACE", 0, memory[storage] + _offset(value)))
                elif isinstance(value, Tensor):
                    arguments.append(
                        _initializer("TENSOR", places[_storage(value)], _offset(value))
                    )
                else:
                    arguments.append(_scalar(kind, value))
            launches.append((variant.key, launch.programs, arguments))
        return cls(call.name, call.formula, call.tensors, arch, size, launches)


def _storage(X: Tensor) -> int:
    return int(X.untyped_storage()._cdata)


def _offset(X: Tensor) -> int:
    return int(X.storage_offset()) * X.element_size()


def _initializer(kind: str, index: int, value: int) -> str:
    return f"{{SCULPT_AOT_{kind}, {index}, {value}}}"


def _scalar(kind: str, value: Any) -> str:
    if kind == "fp32":
        (bits,) = struct.unpack("<I", struct.pack("<f", value))
        return _initializer("BITS32", 0, bits)
    return _initializer({"i32": "BITS32", "i64": "BITS64"}[kind], 0, value)


def write(functions: Sequence[Function], kernels: dict[str, Any], folder: Path) -> None:
    """Write both files into `folder`, for the cubins that lie there."""
    header = folder / "include" / "sculpt_kernels" / "pack.h"
    header.parent.mkdir(parents=True)
    header.write_text(_header(functions), encoding="utf-8")
    (folder / "pack.cpp").write_text(_tables(functions, kernels), encoding="utf-8")


_PREAMBLE = "// Made by python -m sculpt_kernels.aot; changes are lost with the next build.\n"


def _header(functions: Sequence[Function]) -> str:
    lines = [
        "/* Made by python -m sculpt_kernels.aot; changes are lost with the next build.",
        " *",
        " * Tensors are row-major, without gaps, on the device, aligned to 16 bytes; 0-d ones are",
        " * scalars, read when the kernels run. See sculpt_kernels/aot.h for the rest.",
        " */",
        "#ifndef SCULPT_KERNELS_AOT_PACK_H",
        "#define SCULPT_KERNELS_AOT_PACK_H",
        "",
        '#include "sculpt_kernels/aot.h"',
        "",
    ]
    # One function serves all architectures; which kernels it runs is decided on the device.
    once = {function.name: function for function in functions}
    for name, function in once.items():
        archs = ", ".join(f"sm_{f.arch}" for f in functions if f.name == name)
        lines.append(f"/* {function.formula} ({archs})")
        lines.append(" *")
        for tensor, X in function.tensors.items():
            shape = " x ".join(map(str, X.shape)) or "scalar"
            lines.append(f" *   {tensor}: {shape}, {str(X.dtype).removeprefix('torch.')}")
        lines.append(" */")
        parameters = [f"sculpt_device_pointer {tensor}" for tensor in function.tensors]
        values = ", ".join(function.tensors)
        lines += [
            f"static inline int32_t sculpt_{name}(",
            *(f"    {parameter}," for parameter in parameters),
            "    sculpt_device_pointer workspace, void *stream) {",
            f"  const sculpt_device_pointer tensors[] = {{{values}}};",
            f'  return sculpt_aot_run("{name}", tensors, {len(function.tensors)}, workspace, '
            "stream);",
            "}",
            "",
        ]
    return "\n".join([*lines, "#endif", ""])


def _tables(functions: Sequence[Function], kernels: dict[str, Any]) -> str:
    used = sorted({key for function in functions for key, _, _ in function.launches})
    number = {key: i for i, key in enumerate(used)}
    lines = [
        _PREAMBLE,
        '#include "tables.h"',
        "",
        "// The assembler takes in the files as they are, found on its include path.",
        "asm(",
        '    ".section .rodata\\n"',
    ]
    for key in used:
        lines += [
            f'    ".balign 64\\nsculpt_cubin_{number[key]}:\\n"',
            f'    ".incbin \\"{key}.cubin\\"\\n"',
        ]
    lines += ['    ".previous\\n");', "", 'extern "C" {']
    lines += [
        f'extern const unsigned char image_{i} asm("sculpt_cubin_{i}") '
        '__attribute__((visibility("hidden")));'
        for i in number.values()
    ]
    lines += ["}", "", "namespace sculpt {", "namespace {", ""]
    for i, function in enumerate(functions):
        for j, (_, _, arguments) in enumerate(function.launches):
            lines.append(f"const Argument arguments_{i}_{j}[] = {{")
            lines += [f"    {argument}," for argument in arguments]
            lines.append("};")
        rows = ", ".join(
            f"{{{number[key]}, {programs}, arguments_{i}_{j}, {len(arguments)}}}"
            for j, (key, programs, arguments) in enumerate(function.launches)
        )
        lines += [f"const Launch launches_{i}[] = {{{rows}}};", ""]
    lines += ["const Kernel kernels[] = {"]
    for key in used:
        about = kernels[key]
        lines.append(
            f'    {{"{about["function"]}", &image_{number[key]}, {about["threads"]}, '
            f"{about['shared']}}},"
        )
    lines += ["};", "", "const Operation operations[] = {"]
    for i, function in enumerate(functions):
        lines.append(
            f'    {{"{function.name}", {function.arch}, {len(function.tensors)}, '
            f"{function.workspace}, launches_{i}, {len(function.launches)}}},"
        )
    lines += [
        "};",
        "",
        "}  // namespace",
        "",
        f"const Tables tables{{kernels, {len(used)}, operations, {len(functions)}}};",
        "",
        "}  // namespace sculpt",
        "",
    ]
    return "\n".join(lines)
