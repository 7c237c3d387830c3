"""Write a divided model as a plain Hugging Face directory."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sculpt.distributed.processes import Processes
from sculpt.distributed.sharding import device_of
from sculpt.storage.tensors import write_folder

FILE_BYTES = 5 * 10**9


def save_pretrained(
    model: nn.Module, path: str | os.PathLike[str], *, group: ProcessGroup | None = None
) -> None:
    """Write what `model.save_pretrained` would, though no process has the whole model.

    Called by every process. Each writes its shards; the first one then puts files together, one
    tensor at a time, and the directory appears under its name when it is complete.
    `from_pretrained` reads it; the tokenizer is yours to save.

    Args:
        model: a `transformers` model, divided by `fully_shard` or not; no task may be running.
        path: must not exist, or be empty.
        group: the processes that have the model; default: all.

    Raises:
        FileExistsError: there is something at `path`.
        OSError: a process could not write; nothing is left at `path`.
    """
    final = Path(path)
    processes = Processes(group, device_of(next(model.parameters())))
    with processes.as_one() as first:
        if first and final.exists() and (not final.is_dir() or any(final.iterdir())):
            raise FileExistsError(f"path must not exist, or be an empty directory; got {final}")
    token = processes.tell(uuid.uuid4().hex[:8])[0]
    temporary = final.with_name(f".{final.name}.{token}")
    tensors = _once(model)
    try:
        write_folder(temporary, tensors, processes, into_files=_files(tensors))
        with processes.as_one() as first:
            if first:
                _finish(model, temporary)
                os.replace(temporary, final)
    finally:
        if processes.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def _once(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor under the first of its names: tied weights are one."""
    seen: set[int] = set()
    found = {}
    owners = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in model.state_dict().items():
        identity = id(owners.get(name, tensor))
        if identity not in seen:
            seen.add(identity)
            found[name] = tensor.detach()
    return found


def _files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """The number of the file that each tensor goes to, from 1 on; files of at most 5 GB."""
    numbers, number, size = {}, 1, 0
    for name, tensor in tensors.items():
        bytes_ = tensor.numel() * tensor.element_size()
        if size and size + bytes_ > FILE_BYTES:
            number, size = number + 1, 0
        size += bytes_
        numbers[name] = number
    return numbers


def _finish(model: Any, folder: Path) -> None:
    shutil.rmtree(folder / "sharded", ignore_errors=True)
    for name in ("config", "generation_config"):
        about = getattr(model, name, None)
        if about is not None:
            about.save_pretrained(folder)
