"""Run a function in several processes that talk through gloo, and bring back what it returns."""

from __future__ import annotations

import multiprocessing
import os
import sys
import uuid
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 120


def launch(size: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """`function(*arguments)` in `size` processes; their results in the order of their ranks.

    Raises:
        Exception: a process failed; the message has its traceback.
    """
    _warm_up()
    torch.multiprocessing.start_processes(
        _run,
        # A store of their own: those of processes that died are never cleared.
        args=(size, function, str(folder), f"{folder}/store-{uuid.uuid4().hex[:8]}", arguments),
        nprocs=size,
        start_method="forkserver",
    )
    return [torch.load(folder / f"result{rank}.pt", weights_only=False) for rank in range(size)]


@cache
def _warm_up() -> None:
    """Start the server that forks processes: what takes seconds to import it imports once."""
    tests = [p.stem for p in Path(__file__).parent.glob("test_*.py") if p.stem in sys.modules]
    late = ["torch._dynamo", "torch.distributed.checkpoint.hf_storage"]
    multiprocessing.set_forkserver_preload([*tests, *late])
    # It does not get this path otherwise, and says nothing of what it has not found.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _run(
    rank: int, size: int, function: Callable[..., Any], folder: str, store: str, arguments: Any
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=SECONDS),
    )
    try:
        torch.save(function(*arguments), Path(folder) / f"result{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
