"""A sculptor on disk: safetensors and JSON, no decomposition on the way back.

path/sculptor.json               configuration, task, ranks, counters, checksums
path/task.safetensors            bases and original weights: fixed for the length of a task
path/coordinates.safetensors     coordinates, and what the engine keeps beside the weights

A task that is divided over processes has folders of these, see `sculpt.distributed.saving`.
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
from sculpt.distributed import saving
from sculpt.distributed.processes import Processes
from sculpt.distributed.saving import ABOUT
from sculpt.distributed.sharding import as_shard, local, whole, zeros
from sculpt.distributed.shares import rounds
from sculpt.files import checksum, link, replacing_file, write_json
from sculpt.matrices import CompactMatrix, Matrix, UpdateMatrix
from sculpt.subspaces import Bases
from sculpt.targets import Target, find_targets
from sculpt_kernels import is_divided

FORMAT = 1
FilePath = str | os.PathLike[str]
FIXED = "task.safetensors"
MOVING = "coordinates.safetensors"


def save(
    matrices: list[Matrix],
    path: Path,
    about: dict[str, Any],
    previous: FilePath | None,
    processes: Processes,
) -> None:
    """Write a task: shards by every process, or all by the first one."""
    moving = {k: t for m in matrices for k, t in moving_tensors(m).items()}
    last = None if previous is None else Path(previous)

    def fixed() -> dict[str, Tensor]:
        return {k: t for m in matrices for k, t in fixed_tensors(m).items()}

    if any(is_divided(matrix.weight) for matrix in matrices):
        known = None if last is None else same_task(last, about["id"])
        saving.write(path, about, fixed, moving, last, processes.tell(known)[0], processes)
        return
    with processes.first_alone() as first:
        if first:
            write(path, about, fixed, moving, last)


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
    known = None if previous is None else same_task(previous, about["id"])
    if previous is None or known is None or "divided" in known:
        fixed_sum = _save(path / FIXED, fixed())
    else:
        fixed_sum = known["checksums"][FIXED]
        if previous.resolve() != path.resolve():
            with replacing_file(path / FIXED) as temporary:
                link(previous / FIXED, temporary)
    checksums = {FIXED: fixed_sum, MOVING: _save(path / MOVING, moving)}
    write_json(path / ABOUT, {**about, "checksums": checksums})


def read_about(path: Path) -> dict[str, Any]:
    """The description of a save.

    Raises:
        FileNotFoundError: there is no such save.
        ValueError: it is of another format.
    """
    about_path = path / ABOUT
    if not about_path.is_file():
        raise FileNotFoundError(
            f"path must be a directory written by Sculptor.save; {path} has no {ABOUT}"
        )
    try:
        about: dict[str, Any] = json.loads(about_path.read_text(encoding="utf-8"))
        version, _ = about["format"], about["checksums"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{about_path} is not a sculptor's description: {error}") from error
    if version != FORMAT:
        raise ValueError(f"{about_path} has format {version}; this version reads format {FORMAT}")
    return about


def read(
    path: Path, about: Mapping[str, Any], targets: list[Target], processes: Processes
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The fixed and the moving tensors of a save, divided as the weights of `targets` are now.

    Raises:
        ValueError: the save is incomplete, or was changed.
    """
    by_name = {target.name: target for target in targets}
    if "divided" in about:
        rooms = {
            part: {
                key: _room(by_name, key, tuple(shape), getattr(torch, dtype))
                for key, (shape, dtype) in about["tensors"][part].items()
            }
            for part in ("task", "coordinates")
        }
        saving.read(path, about, rooms, processes)
        return rooms["task"], rooms["coordinates"]
    parts = []
    for name in (FIXED, MOVING):
        file = path / name
        if not file.is_file():
            raise ValueError(f"{path} is incomplete: {name} is missing")
        if checksum(file) != about["checksums"].get(name):
            raise ValueError(f"{file} was changed: {ABOUT} has another checksum of it")
        try:
            parts.append(load_file(file))
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
    for part in parts:
        for key, tensor in part.items():
            if is_divided(by_name[key.rsplit("/", 1)[0]].parameter):
                room = _room(by_name, key, tuple(tensor.shape), tensor.dtype)
                part[key] = saving.fill(room, tensor)
    return parts[0], parts[1]


def _room(
    targets: Mapping[str, Target], key: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Where the tensor that is saved as `key` goes: divided as the weight, or as bases are."""
    name, part = key.rsplit("/", 1)
    stored = targets[name].parameter.detach()
    if part == "original":
        return torch.empty_like(stored)
    weight = targets[name].oriented(stored)
    return torch.empty_like(weight, dtype=dtype) if part == "delta" else zeros(weight, shape, dtype)


def config_to_json(config: SculptConfig) -> dict[str, Any]:
    values = asdict(config)
    cache = values["subspace_cache"]
    values["subspace_cache"] = None if cache is None else os.fspath(cache)
    if not isinstance(values["target_modules"], str):
        values["target_modules"] = list(values["target_modules"])
    return values


def describe(matrix: Matrix, checksum: int | None) -> dict[str, Any]:
    """What JSON holds of one matrix."""
    bases = matrix.bases
    return {
        "shape": list(matrix.target.shape),
        "preserved": matrix.target.preserved,
        "complement": bases.complement,
        "energy": bases.energy,
        "method": bases.method,
        "weight": checksum,
    }


def fixed_tensors(matrix: Matrix) -> dict[str, Tensor]:
    bases = matrix.bases
    parts = {"U": bases.U, "V": bases.V, "removed": bases.removed}
    found = {f"{matrix.name}/{key}": part for key, part in parts.items() if part is not None}
    weight = matrix.target.parameter.detach()
    original = as_shard(weight, matrix.original.get(weight.device))
    return {**found, f"{matrix.name}/original": original}


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
        # In memory of its own: a file's may lie at an odd address, where products round otherwise.
        None if part is None else part.to(device, copy=True)
        for part in (fixed.get(f"{target.name}/{key}") for key in ("U", "V", "removed"))
    )
    return Bases(U, V, removed, about["complement"], about["energy"], about["method"])


@torch.no_grad()
def resume(matrix: Matrix, moving: Mapping[str, Tensor]) -> None:
    """Put back what had moved."""
    if isinstance(matrix, CompactMatrix):
        matrix.state.folded.copy_(moving[f"{matrix.name}/folded"])
        matrix.trained.copy_(moving[f"{matrix.name}/C"])
        if matrix.recompute:
            matrix.write(matrix.state.folded)
        if torch.equal(local(matrix.trained), local(matrix.state.folded)):
            matrix.state.note_current()
    elif isinstance(matrix, UpdateMatrix) and matrix.delta is not None:
        matrix.delta.copy_(moving[f"{matrix.name}/delta"])


def derives_weight(matrix: Matrix) -> bool:
    """Whether the weight follows from what is saved here."""
    return isinstance(matrix, CompactMatrix) and matrix.recompute


def weight_checksums(matrices: list[Matrix], processes: Processes) -> dict[str, int]:
    """CRC-32 of the weights that do not follow from what is saved, each found by one process."""
    matrices = [matrix for matrix in matrices if not derives_weight(matrix)]
    found: dict[str, int] = {}
    for indices in rounds([matrix.target.shape for matrix in matrices], processes.size):
        own = {}
        for owner, index in enumerate(indices):
            if index is not None:
                passing = whole(matrices[index].target.parameter.detach())
                if owner == processes.rank:
                    own[matrices[index].name] = _bytes_checksum(passing)
        for part in processes.tell(own):
            found.update(part)
    return found


def check_weights(matrices: list[Matrix], known: Mapping[str, Any], processes: Processes) -> None:
    """Raises:
    ValueError: a weight cannot be derived and the model's is not the one that was saved.
    """
    for name, value in weight_checksums(matrices, processes).items():
        if value != known[name]["weight"]:
            raise ValueError(
                f"model does not fit: the weight of {name!r} is not the one of the moment of "
                "saving; load the model that was saved beside it first"
            )


def _bytes_checksum(weight: Tensor) -> int:
    flat = weight.cpu().contiguous().view(-1).view(torch.uint8)
    return zlib.crc32(flat.numpy().data)


def _save(path: Path, tensors: Mapping[str, Tensor]) -> int:
    with replacing_file(path) as temporary:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary)
        return checksum(temporary)


def same_task(previous: Path, identity: str) -> dict[str, Any] | None:
    """The description in `previous`, or None where it is of another task."""
    try:
        about = read_about(previous)
    except (OSError, ValueError):
        return None
    complete = "divided" in about or (previous / FIXED).exists()
    return about if about.get("id") == identity and complete else None
