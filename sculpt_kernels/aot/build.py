"""Compile a pack: every launch of the chosen operations, for the chosen architectures."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sculpt_kernels.aot import c_source, pack
from sculpt_kernels.aot.calls import Call, calls


@dataclass(frozen=True)
class Choice:
    """What goes into a pack: every combination of these."""

    archs: Sequence[int]
    matrices: Sequence[tuple[int, int]]
    ranks: Sequence[int]
    dtypes: Sequence[str]
    only: Sequence[str] = ()

    def calls(self, arch: int) -> list[Call]:
        return [
            call
            for m, n in self.matrices
            for rank in self.ranks
            if rank <= min(m, n)
            for dtype in self.dtypes
            for call in calls(m, n, rank, dtype, arch)
            if not self.only or call.name.startswith(tuple(self.only))
        ]


def build(choice: Choice, folder: Path) -> int:
    """Write the pack into `folder`, all at once; returns its number of kernels.

    Raises:
        FileExistsError: there is something else at `folder`.
        ValueError: nothing was chosen.
    """
    if not (folder / pack.MANIFEST).exists() and any(X.is_file() for X in folder.rglob("*")):
        raise FileExistsError(f"--out must name a new folder or an older pack; got {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    kernels: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        part = Path(temporary) / folder.name
        part.mkdir()
        functions = []
        for arch in choice.archs:
            for call in choice.calls(arch):
                compiled = []
                for launch in call.launches:
                    variant = pack.Variant.of(launch.kernel, launch.arguments, launch.options, arch)
                    if variant.key not in kernels:
                        kernels[variant.key] = _compile(variant, part)
                    compiled.append(variant)
                if call.alone and call.tensors:
                    functions.append(c_source.Function.of(call, arch, compiled))
        if not kernels:
            raise ValueError(
                "nothing was chosen to compile: a rank must fit its matrix, and --only must be "
                "the start of a name"
            )
        manifest = {**pack.origin(), "archs": list(choice.archs), "kernels": kernels}
        (part / pack.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        c_source.write(functions, kernels, part)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(part, folder)
    return len(kernels)


def _compile(variant: pack.Variant, folder: Path) -> dict[str, Any]:
    """Write machine code and description; returns what a launcher needs."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", variant.arch, 32)
    compiled = triton.compile(variant.source(), target=target, options=dict(variant.options))
    described = compiled.metadata._asdict()
    if described["global_scratch_size"] or described["profile_scratch_size"]:
        raise RuntimeError(f"{variant} wants scratch memory, which the launcher does not provide")
    described["extern_libs"] = []  # paths of this machine, of no use after linking
    (folder / f"{variant.key}.cubin").write_bytes(compiled.asm["cubin"])
    text = json.dumps(described, default=vars, indent=1)
    (folder / f"{variant.key}.json").write_text(text + "\n", encoding="utf-8")
    return {
        "arch": variant.arch,
        "function": described["name"],
        "threads": 32 * described["num_warps"],
        "shared": described["shared"],
    }
