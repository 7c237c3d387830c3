"""Steps whose gradients are not finite change nothing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from sculpt.distributed.processes import Processes
from sculpt.distributed.sharding import local
from sculpt.task.optimizers import held_by
from sculpt_kernels import is_divided


def drop_nonfinite_gradients(optimizer: Optimizer, processes: Processes) -> bool:
    """Take all gradients away where one is not finite: nothing is changed by a step without them.

    Returns:
        Whether that was so, on any process.
    """
    held = held_by(optimizer)
    grads = [local(p.grad) for p in held if p.grad is not None]
    grads = [grad for grad in grads if grad.numel()]
    bad = bool(grads) and not bool(torch.isfinite(_largest(grads)))
    if any(is_divided(p) for p in held):
        bad = processes.any(bad)
    if bad:
        for parameter in held:
            parameter.grad = None
    return bad


def is_captured(optimizer: Optimizer) -> bool:
    """Whether a CUDA graph records this step: the host must not look at values then."""
    grads = (p.grad for p in held_by(optimizer))
    on_cuda = any(grad is not None and grad.is_cuda for grad in grads)
    return on_cuda and torch.cuda.is_current_stream_capturing()


def flag_nonfinite_gradients(optimizer: Optimizer) -> Tensor | None:
    """What a fused optimizer takes as `found_inf`: 1 where a gradient is not finite, else 0.

    Its kernels then change nothing, and no value goes to the host. `None` for optimizers that
    take no such flag, and for gradients that are divided over processes, which would not agree.
    """
    held = held_by(optimizer)
    grads = [p.grad for p in held if p.grad is not None and p.grad.numel()]
    takes = getattr(optimizer, "_step_supports_amp_scaling", False)
    if not takes or not grads or any(is_divided(p) for p in held):
        return None
    return (~torch.isfinite(_largest(grads))).float()


def _largest(grads: list[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(grads, norm_type=float("inf"))
