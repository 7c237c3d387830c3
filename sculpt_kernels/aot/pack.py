"""A folder of compiled kernels, and the launches that are answered from it.

    manifest.json        what the pack was made with, and its kernels by key
    KEY.cubin, KEY.json  machine code and Triton's description of it

A key stands for all that Triton compiles a launch for: kernel, architecture, types, constants,
divisibility and options.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from sculpt_kernels.aot.specialize import specialize

FORMAT = 1
MANIFEST = "manifest.json"


@lru_cache(maxsize=1)
def active() -> Pack | None:
    """The pack that `SCULPT_AOT` names, or `None`."""
    folder = os.environ.get("SCULPT_AOT")
    return Pack.open(Path(folder)) if folder else None


@lru_cache(maxsize=1)
def origin() -> dict[str, Any]:
    """What compiled kernels depend on; a pack serves only where all of it is the same."""
    import triton

    digest = hashlib.sha256()
    for path in sorted((Path(__file__).parent.parent / "kernels").glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return {
        "format": FORMAT,
        "triton": triton.__version__,
        "kernel sources": digest.hexdigest()[:16],
    }


@dataclass(frozen=True)
class Variant:
    """One kernel as one launch wants it, equal for launches that share machine code."""

    kernel: Any = field(compare=False)
    arch: int
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    attributes: tuple[tuple[int], ...]
    options: tuple[tuple[str, int | bool], ...]

    @classmethod
    def of(
        cls, kernel: Any, arguments: dict[str, Any], options: dict[str, int | bool], arch: int
    ) -> Variant:
        signature, constants, attributes = specialize(kernel, arguments)
        for parameter in kernel.params:
            # One kernel for every seed, row and step.
            if parameter.do_not_specialize and signature[parameter.name] == "i32":
                signature[parameter.name] = "i64"
        return cls(
            kernel, arch, kernel.fn.__name__, tuple(signature.items()), tuple(constants.items()),
            tuple(attributes), tuple(options.items()),
        )  # fmt: skip

    @property
    def key(self) -> str:
        said = (self.arch, self.name, self.signature, self.constants, self.attributes, self.options)
        return f"{self.name}_{hashlib.sha256(repr(said).encode()).hexdigest()[:16]}"

    def source(self) -> Any:
        """As Triton's compiler and launcher take it."""
        from triton.compiler import ASTSource

        attributes = {place: [["tt.divisibility", 16]] for place in self.attributes}
        return ASTSource(self.kernel, dict(self.signature), dict(self.constants), attributes)

    def __str__(self) -> str:
        types = ", ".join(f"{name}: {kind}" for name, kind in self.signature if kind != "constexpr")
        constants = ", ".join(f"{name}={value}" for name, value in self.constants)
        return f"{self.name}({types}; {constants})"


class Pack:
    """An opened folder; `find` answers launches."""

    def __init__(self, folder: Path, archs: list[int], kernels: dict[str, Any]) -> None:
        self.folder, self.archs, self.kernels = folder, archs, kernels
        self._loaded: dict[Variant, Any] = {}

    @classmethod
    def open(cls, folder: Path) -> Pack:
        """Read and check the manifest.

        Raises:
            RuntimeError: there is no pack, or it was made with another Triton or other kernels.
        """
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            made_with = {key: manifest[key] for key in origin()}
            archs, kernels = list(manifest["archs"]), dict(manifest["kernels"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RuntimeError(
                f"SCULPT_AOT must name a folder that `python -m sculpt_kernels.aot` made; got "
                f"{folder} ({type(error).__name__}: {error})"
            ) from None
        for what, ours in origin().items():
            if made_with[what] != ours:
                raise RuntimeError(
                    f"SCULPT_AOT names {folder}, whose kernels were compiled with {what} "
                    f"{made_with[what]}; this installation has {what} {ours}. Build the pack again"
                )
        return cls(folder, archs, kernels)

    def find(
        self,
        kernel: Any,
        arguments: dict[str, Any],
        options: dict[str, int | bool],
        capability: tuple[int, int],
    ) -> Any:
        """The compiled kernel for a launch, as Triton launches it: `find(...)[grid](*values)`.

        Raises:
            RuntimeError: the pack is for another architecture, lacks this launch or is not whole.
        """
        arch = 10 * capability[0] + capability[1]
        variant = Variant.of(kernel, arguments, options, arch)
        found = self._loaded.get(variant)
        if found is None:
            found = self._loaded[variant] = self._load(variant)
        return found

    def _load(self, variant: Variant) -> Any:
        from triton.compiler import CompiledKernel

        if variant.arch not in self.archs:
            there = ", ".join(f"sm_{arch}" for arch in self.archs)
            raise RuntimeError(
                f"SCULPT_AOT names {self.folder}, which has kernels for {there}; this device is "
                f"sm_{variant.arch}. Build a pack with --arch {variant.arch}"
            )
        key = variant.key
        if key not in self.kernels:
            raise RuntimeError(
                f"SCULPT_AOT names {self.folder}, which lacks a kernel that this call needs; build "
                f"the pack with its --matrix, --rank and --dtype: {variant}"
            )
        files = {f"{key}.{kind}": str(self.folder / f"{key}.{kind}") for kind in ("json", "cubin")}
        gone = [name for name, path in files.items() if not Path(path).is_file()]
        if gone:
            raise RuntimeError(
                f"SCULPT_AOT names {self.folder}, which lacks {' and '.join(gone)} of its own "
                f"{MANIFEST}; copy the whole pack, or build it again"
            )
        return CompiledKernel(variant.source(), files, key)
