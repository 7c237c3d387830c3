"""Models of other implementations of the method become plain dense ones.

- A PEFT OSF adapter (peft 0.21) holds `U_low`, `S_low`, `V_low` of each matrix after training. What
  they were before comes from a decomposition of the base weight, rounded to its dtype:
  `W = W₀ + U_low diag(S_low) V_low - (the same of W₀)`.
- A mini_trainer checkpoint may hold the factors of all of `W`,
  `W = U_high diag(S_high) V_high + U_low diag(S_low) V_low`.

`V` is stored `(rank, n)` by both. All sums are made in float64 and rounded once.
"""

from __future__ import annotations

import json
import re
import shutil
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sculpt.storage.files import replacing_directory
from sculpt.storage.weights import ADAPTER, INDEX, SINGLE, Stored, StoredWeights

Progress = Callable[[int, int, str], None]
SHARD_BYTES = 4 * 10**9
ADAPTER_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
PEFT_FACTOR = re.compile(r"^(?P<module>.+)\.osf_svd_params\.(?P<factor>[USV]_low)$")
MINI_FACTOR = re.compile(
    r"^(?P<module>.+?)\.(?:osft_params\.)?(?:osft_)?(?P<factor>[USV]_(?:high|low))$"
)
LOW = ("U_low", "S_low", "V_low")
ALL = ("U_high", "S_high", "V_high", *LOW)


class ImportFailed(ValueError):
    """What was to be imported is not what it should be; the message names the tensor."""


@dataclass(frozen=True)
class Imported:
    """What was made: kind of source, matrices that were put together, tensors that were copied."""

    kind: str
    matrices: int
    copied: int

    def __str__(self) -> str:
        return (
            f"{self.kind}: {self.matrices} matrices put together, {self.copied} other tensors "
            "copied"
        )


def import_model(
    source: Path, out: Path, *, base: Path | None = None, progress: Progress | None = None
) -> Imported:
    """Write a plain Hugging Face directory `out` from `source`; dtypes are those of the base model.

    Args:
        source: a PEFT OSF adapter directory, or a mini_trainer checkpoint in Hugging Face format.
        out: new or empty.
        base: the model directory that an adapter was trained on, where `adapter_config.json` does
            not name one on this disk.
        progress: called as `progress(done, total, name)`.

    Raises:
        ImportFailed, StoredWeightsError: the source, or the base model, is not what it should be;
            nothing has been written then.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ImportFailed(f"out={out} is in use: expected a new or empty directory")
    if (source / ADAPTER_CONFIG).is_file():
        model: _Source = _PeftAdapter(source, base)
    else:
        if base is not None:
            raise ImportFailed(f"base={base} is for adapters, and {source} has no {ADAPTER_CONFIG}")
        model = _MiniTrainer(source)
    with replacing_directory(out) as folder:
        _write(model, folder, progress)
        for file in sorted(model.plain.path.iterdir()):
            if file.is_file() and _belongs_to_a_model(file):
                shutil.copyfile(file, folder / file.name)
    return Imported(model.kind, len(model.factors), len(model.names) - len(model.factors))


class _Source(ABC):
    """Dense weights by name, made one at a time.

    Attributes:
        plain: where configuration, tokenizer and all tensors that were not factored come from.
        names: of the dense tensors, in order.
        factors: by module name, the name of each factor on disk.
    """

    kind: str
    plain: StoredWeights
    names: list[str]
    factors: dict[str, dict[str, str]]

    @abstractmethod
    def dense(self, name: str) -> Tensor:
        """The product of the factors of `name`, with what was not factored."""


class _PeftAdapter(_Source):
    kind = "PEFT OSF adapter"

    def __init__(self, source: Path, base: Path | None) -> None:
        try:
            config = json.loads((source / ADAPTER_CONFIG).read_text(encoding="utf-8"))
            kind = config["peft_type"]
        except (ValueError, KeyError, TypeError) as error:
            raise ImportFailed(f"{source / ADAPTER_CONFIG} is no adapter configuration") from error
        if kind != "OSF":
            raise ImportFailed(
                f"{source} is a {kind} adapter, expected OSF; PEFT's merge_and_unload() makes a "
                "plain model of others"
            )
        self.plain = StoredWeights(_base_of(source, config, base))
        self.adapter = StoredWeights(source / ADAPTER)
        self.names = list(self.plain.tensors)
        self.factors, rest = _grouped(self.adapter, PEFT_FACTOR, LOW)
        self.factors = {_without_prefix(m, source): f for m, f in self.factors.items()}
        self.replaced = {self._name(key): key for key in rest}
        for module, factors in self.factors.items():
            stored = self.plain.tensors[self._name(f"{module}.weight", module)]
            _check_factors(self.adapter, module, factors, stored)

    def dense(self, name: str) -> Tensor:
        module = name.removesuffix(".weight")
        if name in self.replaced:
            return self.adapter.read(self.replaced[name])
        W = self.plain.read(name)
        if module not in self.factors:
            return W
        U, S, V = (self.adapter.read(self.factors[module][f]).double() for f in LOW)
        # PEFT rounds the factors of the base weight too, so that a fresh adapter changes nothing.
        before = torch.linalg.svd(W.double(), full_matrices=False)
        U0, S0, V0 = (factor.to(W.dtype).double() for factor in before)
        low = slice(len(S0) - len(S), None)
        change = (U * S) @ V - (U0[:, low] * S0[low]) @ V0[low]
        merged: Tensor = (W.double() + change).to(W.dtype)
        return merged

    def _name(self, key: str, module: str | None = None) -> str:
        name = key if module is not None else _without_prefix(key, self.adapter.path)
        if name not in self.plain.tensors:
            raise ImportFailed(
                f"the adapter has {module or key}, which is not in the base model "
                f"{self.plain.path}: is it the right one?"
            )
        return name


class _MiniTrainer(_Source):
    kind = "mini_trainer checkpoint"

    def __init__(self, source: Path) -> None:
        self.plain = StoredWeights(source)
        self.factors, self.names = _grouped(self.plain, MINI_FACTOR, ALL)
        if not self.factors:
            raise ImportFailed(
                f"{source} has no factors {', '.join(ALL)} and no {ADAPTER_CONFIG}: it is a plain "
                "model already, or of another kind"
            )
        for module, factors in self.factors.items():
            _check_factors(self.plain, module, factors, None)
            if f"{module}.weight" in self.names:
                raise ImportFailed(f"{source} has both {module}.weight and its factors")
            self.names.append(f"{module}.weight")

    def dense(self, name: str) -> Tensor:
        factors = self.factors.get(name.removesuffix(".weight"))
        if factors is None:
            return self.plain.read(name)
        dtype = self.plain.tensors[factors["U_high"]].dtype
        U, S, V, U_low, S_low, V_low = (self.plain.read(factors[f]).double() for f in ALL)
        return torch.addmm((U * S) @ V, U_low * S_low, V_low).to(dtype)


def _base_of(source: Path, config: dict[str, Any], base: Path | None) -> Path:
    if base is not None:
        return base
    named = config.get("base_model_name_or_path")
    if named and Path(named).is_dir():
        return Path(named)
    raise ImportFailed(
        f"{source / ADAPTER_CONFIG} names the base model {named!r}, which is no directory here: "
        "say where it is, --base DIR"
    )


def _without_prefix(name: str, source: Path) -> str:
    if not name.startswith(PEFT_PREFIX):
        raise ImportFailed(f"{source}: {name} does not begin with {PEFT_PREFIX!r}, as PEFT's do")
    return name.removeprefix(PEFT_PREFIX)


def _grouped(
    weights: StoredWeights, pattern: re.Pattern[str], wanted: tuple[str, ...]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The names of the factors by module, and all other names."""
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    rest = []
    for name in weights.tensors:
        if found := pattern.match(name):
            groups[found["module"]][found["factor"]] = name
        else:
            rest.append(name)
    for module, factors in groups.items():
        missing = [factor for factor in wanted if factor not in factors]
        if missing:
            raise ImportFailed(f"{weights.path}: {module} has no {', '.join(missing)}")
    return dict(groups), rest


def _check_factors(
    weights: StoredWeights, module: str, factors: dict[str, str], dense: Stored | None
) -> None:
    """`U` `(m, r)`, `S` `(r,)`, `V` `(r, n)` fit each other and the dense weight.

    Raises:
        ImportFailed: they do not, or a value is not finite.
    """
    shapes = {factor: weights.tensors[name].shape for factor, name in factors.items()}
    for part in sorted({factor[2:] for factor in factors}):
        U, S, V = (shapes[f"{side}_{part}"] for side in "USV")
        fits = len(U) == len(V) == 2 and len(S) == 1 and U[1] == S[0] == V[0]
        outer = (U[0], V[1]) if fits else None
        if not fits or (dense is not None and outer != dense.shape):
            expected = "" if dense is None else f", expected those of a weight {dense.shape}"
            raise ImportFailed(
                f"{weights.path}: the factors of {module} have shapes U_{part} {U}, S_{part} {S}, "
                f"V_{part} {V}, which do not fit{expected}"
            )
    if "U_high" in shapes and (
        shapes["U_high"][0] != shapes["U_low"][0] or shapes["V_high"][1] != shapes["V_low"][1]
    ):
        raise ImportFailed(f"{weights.path}: high and low factors of {module} do not fit together")
    for factor, name in factors.items():
        if not bool(torch.isfinite(weights.read(name)).all()):
            raise ImportFailed(
                f"{weights.path}: {factor} of {module} has values that are not finite"
            )


def _write(model: _Source, folder: Path, progress: Progress | None) -> None:
    """All dense tensors, in as many files as their size asks for, held one file at a time."""
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    total = 0
    shards = list(_shards(model))
    done = 0
    for index, names in enumerate(shards, start=1):
        file = SINGLE
        if len(shards) > 1:
            file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            tensors[name] = model.dense(name)
            total += tensors[name].nbytes
            done += 1
            if progress is not None:
                progress(done, len(model.names), name)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(content, indent=2), encoding="utf-8")


def _shards(model: _Source) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name in model.names:
        bytes_here = _dense_bytes(model, name)
        if names and size + bytes_here > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += bytes_here
    yield names


def _dense_bytes(model: _Source, name: str) -> int:
    if name in model.plain.tensors:
        return model.plain.tensors[name].nbytes
    factors = model.factors[name.removesuffix(".weight")]
    U, V = (model.plain.tensors[factors[factor]] for factor in ("U_high", "V_high"))
    return U.shape[0] * V.shape[1] * U.dtype.itemsize


def _belongs_to_a_model(file: Path) -> bool:
    """Configuration, tokenizer and the like: small files that are no weights."""
    weights = (".safetensors", ".bin", ".pt", ".pth", ".index.json")
    return not file.name.endswith(weights) and not file.name.startswith("adapter_")
