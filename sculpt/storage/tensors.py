"""Named tensors on disk: one safetensors file, or a folder where every process has its shards."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sculpt.distributed.processes import Processes
from sculpt.storage.files import checksum, replacing_file
from sculpt_kernels import is_divided


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file, atomically."""
    with replacing_file(path) as temporary:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary)


def read_file(path: Path) -> dict[str, Tensor]:
    """Raises:
    ValueError: the file is none, or damaged.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return tensors


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


def read_folder(path: Path, tensors: dict[str, Tensor], processes: Processes) -> None:
    """Fill `tensors`, each divided in its own way, from a folder of any number of processes."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        load(
            tensors,
            storage_reader=HuggingFaceStorageReader(str(path)),
            process_group=processes.group,
            no_dist=processes.size == 1,
        )


def fill(tensor: Tensor, whole: Tensor) -> Tensor:
    """`tensor` with the part of `whole` that belongs there."""
    if is_divided(tensor):
        from torch.distributed.tensor import distribute_tensor

        whole = distribute_tensor(
            whole.to(tensor.to_local().device),
            tensor.device_mesh,
            tensor.placements,
            src_data_rank=None,
        )
    return tensor.copy_(whole)


def describe(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Shape and dtype of each, as JSON holds them."""
    return {
        key: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        for key, tensor in tensors.items()
    }


def checksums(path: Path, names: Iterable[str], processes: Processes) -> dict[str, int]:
    """CRC-32 of files, and of all files in folders, below `path`, each found by one process."""
    files = []
    for name in names:
        inside = sorted((path / name).glob("*.safetensors"))
        files += [f"{name}/{file.name}" for file in inside] if inside else [name]
    own = {
        name: checksum(path / name)
        for name in files[processes.rank :: processes.size]
        if (path / name).is_file()
    }
    return {name: value for part in processes.tell(own) for name, value in part.items()}


def check(path: Path, expected: Mapping[str, int], processes: Processes) -> None:
    """Raises:
    ValueError: on every process, where a file is missing or has changed.
    """
    found = checksums(path, expected, processes)
    for name, value in expected.items():
        if name not in found:
            raise ValueError(f"{path} is incomplete: {name} is missing")
        if found[name] != value:
            raise ValueError(f"{path / name} was changed: it has another checksum than noted")
