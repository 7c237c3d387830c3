"""What each process holds beside its share while subspaces are found, for a divided model.

    python -m bench.decomposition            # 1, 2 and 4 processes; writes a file of results

Counted are all allocations of torch on the CPU, temporaries of its operators included. The shards
of bases, which stay, are taken off.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from bench.memory import peak
from bench.training import about
from sculpt import SculptConfig
from sculpt.distributed.processes import Processes
from sculpt.distributed.sharding import local
from sculpt.storage.files import write_json
from sculpt.task.bases import Bases
from sculpt.task.choose import find_all
from sculpt.task.targets import find_targets

RESULT = Path(__file__).parent / "results" / "decomposition.json"
RATIO = 0.25


def beside(width: int, layers: int) -> dict[str, int]:
    """Bytes at the peak of all decompositions, those of bases that stay, and of one matrix."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    config = SculptConfig(unfreeze_rank_ratio=RATIO)
    targets = find_targets(model, config).chosen
    found: list[Bases] = []
    held = peak(
        lambda: found.extend(
            find_all(targets, config, {}, Processes(None, torch.device("cpu")), None)
        )
    )
    parts = [local(part) for bases in found for part in (bases.U, bases.V) if part is not None]
    stays = sum(part.numel() * part.element_size() for part in parts)
    return {"peak": held.total, "stays": stays, "matrix": 4 * width**2}


def _process(rank: int, size: int, folder: str, width: int, layers: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/s", rank=rank, world_size=size)
    found = beside(width, layers)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measure(size: int, width: int, layers: int) -> list[dict[str, int]]:
    """What every process found, in `size` processes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, args=(size, folder, width, layers), nprocs=size)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(size)]


def main() -> None:
    rows: list[dict[str, Any]] = []
    for size in (1, 2, 4):
        for layers in (4, 16):
            found = measure(size, 512, layers)
            rows.append({"processes": size, "layers": layers, "by rank": found})
            most = [f"{(rank['peak'] - rank['stays']) / rank['matrix']:.2f}" for rank in found]
            print(size, layers, "matrices beside the share, by rank:", *most)
    command = "python -m bench.decomposition"
    write_json(RESULT, about() | {"command": command, "width": 512, "ratio": RATIO, "rows": rows})


if __name__ == "__main__":
    main()
