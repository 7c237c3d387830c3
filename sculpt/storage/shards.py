"""A divided task on disk: every process writes its shards, any number of processes read them.

path/sculptor.json            written last: the save is what it names, whatever else is there
path/task-ID/                 bases and original weights: fixed for the length of a task
path/coordinates-ID/          coordinates, and what the engine keeps beside the weights

The folders hold safetensors, written and read by `torch.distributed.checkpoint`.
"""

from __future__ import annotations

import shutil
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sculpt.distributed.processes import Processes
from sculpt.storage.files import checksum, link, write_json
from sculpt_kernels import is_divided

ABOUT = "sculptor.json"


def write(
    path: Path,
    about: dict[str, Any],
    fixed: Mapping[str, Tensor] | None,
    moving: Mapping[str, Tensor],
    previous: Path | None,
    known: Mapping[str, Any] | None,
    processes: Processes,
) -> None:
    """Write both folders, then `sculptor.json`, then take away what an earlier save left there.

    Args:
        fixed: None where it is linked, not written again, from
        previous, known: an earlier save of the same task and what is in its `sculptor.json`.

    Raises:
        Exception: on every process where one of them fails; an earlier save in `path` stays whole.
    """
    token = processes.tell(uuid.uuid4().hex[:8])[0]
    folders = {"task": f"task-{token}", "coordinates": f"coordinates-{token}"}
    if fixed is not None:
        write_folder(path / folders["task"], fixed, processes)
        fixed_shapes = {key: _describe(tensor) for key, tensor in fixed.items()}
    else:
        assert previous is not None
        assert known is not None
        fixed_shapes = known["tensors"]["task"]
        if previous.resolve() == path.resolve():
            folders["task"] = known["divided"]["task"]
        else:
            with processes.as_one() as first:
                if first:
                    source = previous / known["divided"]["task"]
                    _link_folder(source, path / folders["task"])
    write_folder(path / folders["coordinates"], moving, processes)
    shapes = {
        "task": fixed_shapes,
        "coordinates": {key: _describe(tensor) for key, tensor in moving.items()},
    }
    sums = _checksums([path / folder for folder in folders.values()], processes)
    with processes.as_one() as first:
        if first:
            about = {**about, "divided": folders, "tensors": shapes, "checksums": sums}
            write_json(path / ABOUT, about)
            clear(path, folders)


def clear(path: Path, keep: Mapping[str, str]) -> None:
    """Take away what earlier saves left in `path`."""
    for old in path.iterdir():
        if old.name.startswith(("task-", "coordinates-", "learned-")):
            if old.name in keep.values():
                continue
            if old.is_dir():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.unlink(missing_ok=True)


def read(
    path: Path,
    about: Mapping[str, Any],
    rooms: Mapping[str, dict[str, Tensor]],
    processes: Processes,
) -> None:
    """Fill `rooms["task"]` and `rooms["coordinates"]`, each in its own layout.

    Raises:
        ValueError: files are missing or were changed.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    folders = [path / folder for folder in about["divided"].values()]
    if _checksums(folders, processes) != about["checksums"]:
        raise ValueError(f"{path} was changed or is incomplete: {ABOUT} has other checksums")
    for part, folder in zip(("task", "coordinates"), folders, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            load(
                rooms[part],
                storage_reader=HuggingFaceStorageReader(str(folder)),
                process_group=processes.group,
                no_dist=processes.size == 1,
            )


def fill(room: Tensor, whole: Tensor) -> Tensor:
    """`room` with the part of `whole` that belongs there."""
    if is_divided(room):
        from torch.distributed.tensor import distribute_tensor

        whole = distribute_tensor(
            whole.to(room.to_local().device), room.device_mesh, room.placements, src_data_rank=None
        )
    return room.copy_(whole)


def write_folder(
    path: Path,
    tensors: Mapping[str, Tensor],
    processes: Processes,
    *,
    into_files: dict[str, int] | None = None,
) -> None:
    """Write a folder of safetensors, every process its shards.

    Args:
        into_files: number of the file that each tensor is put into, whole, in the end.

    Raises:
        OSError: on every process where one cannot write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            save(
                {key: tensor.detach() for key, tensor in tensors.items()},
                storage_writer=HuggingFaceStorageWriter(
                    str(path),
                    fqn_to_index_mapping=into_files,
                    save_distributed=True,
                    enable_consolidation=into_files is not None,
                ),
                process_group=processes.group,
                no_dist=processes.size == 1,
            )
    except CheckpointException as problem:  # No Exception: who catches those would miss it.
        ranks = {rank: str(error) for rank, (error, _) in problem.failures.items()}
        raise OSError(f"{path} could not be written; by rank: {ranks}") from problem


def _describe(tensor: Tensor) -> list[Any]:
    return [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]


def _checksums(folders: list[Path], processes: Processes) -> dict[str, int]:
    """CRC-32 of every file, each found by one process."""
    files = sorted(file for folder in folders for file in folder.glob("*.safetensors"))
    own = {
        f"{file.parent.name}/{file.name}": checksum(file)
        for file in files[processes.rank :: processes.size]
    }
    return {name: value for part in processes.tell(own) for name, value in part.items()}


def _link_folder(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for file in source.iterdir():
        link(file, target / file.name)
