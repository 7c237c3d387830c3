"""What several processes must have in common."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import nn

from sculpt.config import SculptConfig, config_to_json
from sculpt.distributed.processes import Processes
from sculpt.task.supported import WRAP_LATER
from sculpt.task.targets import Target
from sculpt_kernels import is_divided


def check_agreement(
    processes: Processes, config: SculptConfig, name: str | None, targets: list[Target]
) -> None:
    """Every process must start the same task on the same weights.

    Raises:
        ValueError: they do not; it names what differs and on which rank.
    """
    if processes.size == 1:
        return
    settings = config_to_json(config)
    del settings["subspace_cache"]
    processes.require_equal(
        {
            "config": settings,
            "task": {"name": name},
            "matrix": {
                target.name: [*target.shape, str(target.parameter.dtype), target.preserved]
                for target in targets
            },
            "weight sum of": {target.name: _sum(target) for target in targets},
        }
    )


def _sum(target: Target) -> str:
    """As text: NaN equals NaN there."""
    if is_divided(target.parameter):
        return f"divided as {target.parameter.placements}"
    return repr(float(target.parameter.detach().sum(dtype=torch.float64)))


def check_replicas(processes: Processes, trained: dict[str, nn.Parameter]) -> None:
    """Gradients must be those of all processes together when the first step comes.

    Raises:
        RuntimeError: they differ from process to process.
    """
    if processes.size == 1:
        return
    norms: dict[str, Any] = {
        name: None if p.grad is None else float(p.grad.detach().norm(dtype=torch.float64))
        for name, p in trained.items()
        if not is_divided(p)
    }
    # Text, because gradients that are not finite have their own remedy.
    said = [json.loads(text) for text in processes.tell(json.dumps(norms))]
    for rank, other in enumerate(said):
        for name, norm in said[0].items():
            if not _same(norm, other[name]):
                raise RuntimeError(
                    f"the gradient of {name!r} is not averaged over the processes: its norm is "
                    f"{norm} on rank 0 and {other[name]} on rank {rank}, and the replicas would "
                    f"part. Train through the wrapper, and {WRAP_LATER}"
                )


def _same(a: float | None, b: float | None) -> bool:
    if a is None or b is None:
        return a is b
    return math.isclose(a, b, rel_tol=1e-6) or (math.isnan(a) and math.isnan(b)) or a == b
