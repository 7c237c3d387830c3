"""A running task on disk: safetensors and JSON, no decomposition on the way back.

path/sculptor.json        written last: the save is what it names, whatever else is there
path/task-ID...           bases and original weights: fixed for the length of a task
path/coordinates-ID...    coordinates, and what the engine keeps beside the weights
path/memory-ID...         what earlier tasks use, where something is protected: fixed, too

Each is a safetensors file, or a folder of shards where the weights are divided over processes.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sculpt.config import SculptConfig
from sculpt.distributed.processes import Processes, rounds
from sculpt.distributed.sharding import as_shard, local, whole, zeros
from sculpt.storage import tensors as tensors_on_disk
from sculpt.storage.files import link, write_json
from sculpt.storage.tensors import check, checksums, fill
from sculpt.task.bases import Bases
from sculpt.task.compact import CoordinateMatrix
from sculpt.task.matrix import Matrix
from sculpt.task.targets import Target, find_targets
from sculpt_kernels import is_divided

FORMAT = 3
ABOUT = "sculptor.json"
FilePath = str | os.PathLike[str]


@dataclass(frozen=True)
class Parts:
    """The tensors of a save.

    Attributes:
        tensors: by part and name; `None` where an earlier save has them. Without shards all but the
            first process have none.
        previous, known: that earlier save, and its description.
        divided: whether each process writes its own.
    """

    tensors: Mapping[str, Mapping[str, Tensor] | None]
    previous: Path | None
    known: dict[str, Any] | None
    divided: bool

    @classmethod
    def of(
        cls,
        matrices: list[Matrix],
        memory: Mapping[str, Tensor],
        identity: str,
        previous: Path | None,
        processes: Processes,
    ) -> Parts:
        """Those of a running task as they are now, sharing memory with it."""
        divided = any(is_divided(matrix.weight) for matrix in matrices)
        with processes.as_one() as first:
            known = same_task(previous, identity, divided) if first and previous else None
        known = processes.tell(known)[0]
        with processes.as_one() as first:
            if not divided and not first:
                return cls({}, previous, known, divided)
            fixed = None
            if known is None:
                fixed = {k: t for matrix in matrices for k, t in fixed_tensors(matrix).items()}
            moving = {k: t for matrix in matrices for k, t in moving_tensors(matrix).items()}
        parts: dict[str, Mapping[str, Tensor] | None] = {"task": fixed, "coordinates": moving}
        if memory:
            parts["memory"] = memory if known is None else None
        return cls(parts, previous, known, divided)

    def copied(self, processes: Processes) -> Parts:
        """In host memory of their own."""
        with processes.as_one():
            copies = {
                part: None if tensors is None else _copies(tensors)
                for part, tensors in self.tensors.items()
            }
        return replace(self, tensors=copies)

    def write(self, path: Path, about: dict[str, Any], processes: Processes) -> None:
        """Write a task; where nothing is divided, the first process does.

        Raises:
            Exception: on every process where one fails; an earlier save in `path` stays whole.
        """
        token = processes.tell(uuid.uuid4().hex[:8])[0]
        if self.divided:
            self._write(path, about, token, processes)
            return
        with processes.as_one() as first:
            if first:
                self._write(path, about, token, processes.alone())

    def _write(self, path: Path, about: dict[str, Any], token: str, processes: Processes) -> None:
        suffix = "" if self.divided else ".safetensors"
        names = {part: f"{part}-{token}{suffix}" for part in self.tensors}
        shapes = {}
        for part, tensors in self.tensors.items():
            if tensors is not None:
                if self.divided:
                    tensors_on_disk.write_folder(path / names[part], tensors, processes)
                else:
                    tensors_on_disk.write_file(path / names[part], tensors)
                shapes[part] = tensors_on_disk.describe(tensors)
                continue
            assert self.previous is not None
            assert self.known is not None
            shapes[part], earlier = self.known["tensors"][part], self.known["files"][part]
            if self.previous.resolve() == path.resolve():
                names[part] = earlier
                continue
            with processes.as_one() as first:
                if first:
                    link(self.previous / earlier, path / names[part])
        sums = checksums(path, names.values(), processes)
        with processes.as_one() as first:
            if first:
                more = {"files": names, "tensors": shapes, "checksums": sums}
                write_json(path / ABOUT, {**about, "divided": self.divided, **more})
                _clear(path, names)


def _clear(path: Path, keep: Mapping[str, str]) -> None:
    """Take away what earlier saves left in `path`."""
    for old in path.iterdir():
        if old.name.startswith(("task-", "coordinates-", "memory-")):
            if old.name in keep.values():
                continue
            if old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.unlink(missing_ok=True)


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        key: as_shard(tensor, local(tensor.detach()).to("cpu", copy=True))
        for key, tensor in tensors.items()
    }


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
) -> dict[str, dict[str, Tensor]]:
    """The tensors of a save by part, divided as the weights of `targets` are now.

    Raises:
        ValueError: the save is incomplete, or was changed.
    """
    by_name = {target.name: target for target in targets}
    check(path, about["checksums"], processes)
    parts: dict[str, dict[str, Tensor]] = {}
    for part, name in about["files"].items():
        if about["divided"]:
            parts[part] = {
                key: _empty(by_name, key, tuple(shape), getattr(torch, dtype), processes.device)
                for key, (shape, dtype) in about["tensors"][part].items()
            }
            tensors_on_disk.read_folder(path / name, parts[part], processes)
            continue
        parts[part] = tensors_on_disk.read_file(path / name)
        if part == "memory":
            continue
        for key, tensor in parts[part].items():
            if is_divided(by_name[key.rsplit("/", 1)[0]].parameter):
                shape = tuple(tensor.shape)
                empty = _empty(by_name, key, shape, tensor.dtype, processes.device)
                parts[part][key] = fill(empty, tensor)
    return parts


def _empty(
    targets: Mapping[str, Target],
    key: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """For the tensor that is saved as `key`: divided as the weight is, or as bases are; whole
    where it is of no target."""
    name, part = key.rsplit("/", 1)
    if name not in targets:
        return torch.empty(shape, dtype=dtype, device=device)
    stored = targets[name].parameter.detach()
    if part == "original":
        return torch.empty_like(stored)
    return zeros(targets[name].oriented(stored), shape, dtype)


def describe(matrices: list[Matrix], processes: Processes) -> dict[str, dict[str, Any]]:
    """What JSON holds of each matrix."""
    checksums = weight_checksums(matrices, processes)
    return {
        matrix.name: {
            "shape": list(matrix.target.shape),
            "preserved": matrix.target.preserved,
            "complement": matrix.bases.complement,
            "energy": matrix.bases.energy,
            "method": matrix.bases.method,
            "gain": matrix.bases.gain,
            "weight": checksums.get(matrix.name),
            "random_roundings": matrix.roundings() or 0,
        }
        for matrix in matrices
    }


def fixed_tensors(matrix: Matrix) -> dict[str, Tensor]:
    bases = matrix.bases
    parts = {"U": bases.U, "V": bases.V, "removed": bases.removed}
    found = {f"{matrix.name}/{key}": part for key, part in parts.items() if part is not None}
    weight = matrix.target.parameter.detach()
    original = as_shard(weight, matrix.original.get(weight.device))
    return {**found, f"{matrix.name}/original": original}


def moving_tensors(matrix: Matrix) -> dict[str, Tensor]:
    if not isinstance(matrix, CoordinateMatrix):
        return {}
    parts = {"C": matrix.trained, "folded": matrix.state.folded}
    return {f"{matrix.name}/{key}": part for key, part in parts.items() if part is not None}


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
    return Bases(
        U, V, removed, about["complement"], about["energy"], about["method"], about.get("gain", 1.0)
    )


@torch.no_grad()
def resume(matrices: list[Matrix], moving: Mapping[str, Tensor], known: Mapping[str, Any]) -> None:
    """Put back what had moved."""
    for matrix in matrices:
        if isinstance(matrix, CoordinateMatrix):
            matrix.resume(
                moving[f"{matrix.name}/C"],
                moving.get(f"{matrix.name}/folded"),
                known[matrix.name]["random_roundings"],
            )


def derives_weight(matrix: Matrix) -> bool:
    """Whether the weight follows from what is saved here."""
    return isinstance(matrix, CoordinateMatrix) and matrix.recompute


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


def same_task(previous: Path, identity: str, divided: bool) -> dict[str, Any] | None:
    """The description in `previous`, or None where it is of another task or of another layout."""
    try:
        about = read_about(previous)
    except (OSError, ValueError):
        return None
    same = about.get("id") == identity and about["divided"] == divided
    return about if same and (previous / about["files"]["task"]).exists() else None
