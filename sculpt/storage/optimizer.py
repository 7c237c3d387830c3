"""The optimizer's state in checkpoints of a Trainer whose model `fully_shard` has divided.

At a restart the Trainer loads it as soon as accelerate has divided the model: before there are
coordinates that it could belong to. So it is put where the Trainer does not look.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from sculpt.distributed.processes import Processes

WHOLE, SHARDS = "optimizer.bin", "optimizer_0"  # as accelerate calls them
SCHEDULER = "scheduler.pt"


def put_aside(checkpoint: Path, folder: Path, processes: Processes) -> None:
    """Move the state that the Trainer has written into `folder`."""
    with processes.as_one() as first:
        if first:
            for name in (WHOLE, SHARDS):
                if (checkpoint / name).exists():
                    os.replace(checkpoint / name, folder / name)


def load(
    checkpoint: Path,
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: Any,
    processes: Processes,
) -> None:
    """Give optimizer and scheduler what they had when `checkpoint` was written.

    Raises:
        ValueError: there is no such state.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.checkpoint.state_dict_loader import load as load_shards

    options = StateDictOptions()
    if (folder / SHARDS).is_dir():
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        load_shards(state, storage_reader=FileSystemReader(folder / SHARDS))
        values = state["optimizer"]
    elif (folder / WHOLE).is_file():
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        first = processes.rank == 0
        values = torch.load(folder / WHOLE, weights_only=True, mmap=True) if first else {}
    else:
        raise ValueError(
            f"{folder} has no state of the optimizer: the checkpoint was not finished, or not made "
            "with fsdp; resume from the checkpoint before it"
        )
    set_optimizer_state_dict(model, optimizer, values, options=options)
    scheduler.load_state_dict(torch.load(checkpoint / SCHEDULER, weights_only=True))
