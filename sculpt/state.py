"""A sculptor on disk: safetensors and JSON, no decomposition on the way back.

path/sculptor.json               configuration, task, ranks, counters, checksums
path/task.safetensors            bases and original weights: fixed for the length of a task
path/coordinates.safetensors     coordinates, and what the engine keeps beside the weights
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sculpt.config import SculptConfig
from sculpt.files import replacing_file, write_json
from sculpt.matrices import CompactMatrix, Matrix, UpdateMatrix
from sculpt.subspaces import Bases
from sculpt.targets import Target, find_targets

FORMAT = 1
ABOUT = "sculptor.json"
FIXED = "task.safetensors"
MOVING = "coordinates.safetensors"


def write(
    path: Path,
    about: dict[str, Any],
    fixed: Callable[[], Mapping[str, Tensor]],
    moving: Mapping[str, Tensor],
    previous: Path | None,
) -> None:
    """Write the three files, `sculptor.json` last; it names the others' checksums.

    Where `previous` has a save of the same task, its fixed part is linked, not written again.
    """
    path.mkdir(parents=True, exist_ok=True)
    checksum = None if previous is None else _same_task(previous, about["id"])
    if previous is None or checksum is None:
        checksum = _save(path / FIXED, fixed())
    elif previous.resolve() != path.resolve():
        with replacing_file(path / FIXED) as temporary:
            _link(previous / FIXED, temporary)
    checksums = {FIXED: checksum, MOVING: _save(path / MOVING, moving)}
    write_json(path / ABOUT, {"format": FORMAT, **about, "checksums": checksums})


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """What `write` wrote.

    Raises:
        FileNotFoundError: there is no such save.
        ValueError: it is of another format, incomplete, or was changed.
    """
    about_path = path / ABOUT
    if not about_path.is_file():
        raise FileNotFoundError(
            f"path must be a directory written by Sculptor.save; {path} has no {ABOUT}"
        )
    try:
        about = json.loads(about_path.read_text(encoding="utf-8"))
        version = about["format"]
        checksums = about["checksums"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{about_path} is not a sculptor's description: {error}") from error
    if version != FORMAT:
        raise ValueError(f"{about_path} has format {version}; this version reads format {FORMAT}")
    parts = []
    for name in (FIXED, MOVING):
        file = path / name
        if not file.is_file():
            raise ValueError(f"{path} is incomplete: {name} is missing")
        if _checksum(file) != checksums.get(name):
            raise ValueError(f"{file} was changed: {ABOUT} has another checksum of it")
        try:
            parts.append(load_file(file))
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
    return about, parts[0], parts[1]


def config_to_json(config: SculptConfig) -> dict[str, Any]:
    values = asdict(config)
    cache = values["subspace_cache"]
    values["subspace_cache"] = None if cache is None else os.fspath(cache)
    if not isinstance(values["target_modules"], str):
        values["target_modules"] = list(values["target_modules"])
    return values


def describe(matrix: Matrix) -> dict[str, Any]:
    """What JSON holds of one matrix."""
    bases = matrix.bases
    return {
        "shape": list(matrix.target.shape),
        "preserved": matrix.target.preserved,
        "complement": bases.complement,
        "energy": bases.energy,
        "method": bases.method,
        "weight": None if derives_weight(matrix) else _weight_checksum(matrix.target),
    }


def fixed_tensors(matrix: Matrix) -> dict[str, Tensor]:
    bases = matrix.bases
    parts = {"U": bases.U, "V": bases.V, "removed": bases.removed}
    found = {f"{matrix.name}/{key}": part for key, part in parts.items() if part is not None}
    device = matrix.target.parameter.device
    return {**found, f"{matrix.name}/original": matrix.original.get(device)}


def moving_tensors(matrix: Matrix) -> dict[str, Tensor]:
    if isinstance(matrix, CompactMatrix):
        return {f"{matrix.name}/C": matrix.trained, f"{matrix.name}/folded": matrix.state.folded}
    if isinstance(matrix, UpdateMatrix) and matrix.delta is not None:
        return {f"{matrix.name}/delta": matrix.delta}
    return {}


def flags_by_name(model: nn.Module, flags: Mapping[nn.Parameter, bool]) -> dict[str, bool]:
    return {name: flags[p] for name, p in model.named_parameters() if p in flags}


def put_flags(model: nn.Module, flags: Mapping[str, bool]) -> None:
    """`requires_grad` as it was before the task."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags.get(name, parameter.requires_grad))


def targets_of(model: nn.Module, config: SculptConfig, known: Mapping[str, Any]) -> list[Target]:
    """The targets that were saved, with their ranks.

    Raises:
        ValueError: the model has not all of them.
    """
    targets = [
        replace(target, preserved=known[target.name]["preserved"])
        for target in find_targets(model, config).chosen
        if target.name in known
    ]
    missing = sorted(set(known) - {target.name for target in targets})
    if missing:
        raise ValueError(f"model does not fit: it has no {missing[0]!r}, which was saved")
    return targets


def bases_of(target: Target, about: Mapping[str, Any], fixed: Mapping[str, Tensor]) -> Bases:
    """The bases that were saved for `target`, on its device.

    Raises:
        ValueError: the model's weight is not the one that was saved.
    """
    if list(target.shape) != about["shape"]:
        raise ValueError(
            f"model does not fit: {target.name!r} is {target.shape}, the save has {about['shape']}"
        )
    device = target.parameter.device
    U, V, removed = (
        None if part is None else part.to(device)
        for part in (fixed.get(f"{target.name}/{key}") for key in ("U", "V", "removed"))
    )
    return Bases(U, V, removed, about["complement"], about["energy"], about["method"])


@torch.no_grad()
def resume(matrix: Matrix, about: Mapping[str, Any], moving: Mapping[str, Tensor]) -> None:
    """Put back what had moved.

    Raises:
        ValueError: the weight cannot be derived and the model's is not the one that was saved.
    """
    if isinstance(matrix, CompactMatrix):
        matrix.state.folded.copy_(moving[f"{matrix.name}/folded"])
        matrix.trained.copy_(moving[f"{matrix.name}/C"])
        if matrix.recompute:
            matrix.write(matrix.state.folded)
        if torch.equal(matrix.trained, matrix.state.folded):
            matrix.state.note_current()
    elif isinstance(matrix, UpdateMatrix) and matrix.delta is not None:
        matrix.delta.copy_(moving[f"{matrix.name}/delta"])
    if about["weight"] is not None and about["weight"] != _weight_checksum(matrix.target):
        raise ValueError(
            f"model does not fit: the weight of {matrix.name!r} is not the one of the moment of "
            "saving; load the model that was saved beside it first"
        )


def derives_weight(matrix: Matrix) -> bool:
    """Whether the weight follows from what is saved here."""
    return isinstance(matrix, CompactMatrix) and matrix.recompute


def _weight_checksum(target: Target) -> int:
    """CRC-32 of the weight's bytes."""
    flat = target.parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return zlib.crc32(flat.numpy().data)


def _save(path: Path, tensors: Mapping[str, Tensor]) -> int:
    with replacing_file(path) as temporary:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary)
        return _checksum(temporary)


def _same_task(previous: Path, identity: str) -> int | None:
    """The checksum of the fixed part in `previous`, or None where it is of another task."""
    try:
        about = json.loads((previous / ABOUT).read_text(encoding="utf-8"))
        checksum: int = about["checksums"][FIXED]
    except (OSError, ValueError, KeyError):
        return None
    return checksum if about.get("id") == identity and (previous / FIXED).exists() else None


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # Another file system, or one without links.
        target.write_bytes(source.read_bytes())


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            value = zlib.crc32(block, value)
    return value
