"""Two tasks of twenty steps on a small model, the same in any number of processes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sculpt import SculptConfig, Sculptor

STEPS = 20
BATCH = 24
CLIP = 0.01


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Wide, tall and square layers whose sizes few numbers of processes divide."""
    torch.manual_seed(0)
    sizes = [(13, 24), (24, 10), (10, 10), (10, 5)]
    layers: list[nn.Module] = []
    for inputs, outputs in sizes:
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def batch(task: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * task + step)
    return (
        torch.randn(BATCH, 13, generator=generator),
        torch.randn(BATCH, 5, generator=generator),
    )


def share(x: torch.Tensor) -> torch.Tensor:
    """The rows of this process; all of them where there is one."""
    if not dist.is_initialized():
        return x
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def mean(loss: torch.Tensor) -> float:
    """Over all processes, which have equally many rows."""
    total = loss.detach().double()
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return float(total)


def started(
    model: nn.Module, config: SculptConfig | None = None, *, kind: Any = torch.optim.AdamW, lr=0.01
) -> tuple[Sculptor, torch.optim.Optimizer]:
    """A running task, and its attached optimizer."""
    sculptor = Sculptor(model, config or SculptConfig())
    sculptor.begin_task(name="first")
    optimizer = kind(sculptor.parameters(), lr=lr)
    sculptor.attach(optimizer)
    return sculptor, optimizer


def refused(message: str, action: Any, kind: Any = (ValueError, RuntimeError)) -> None:
    """`action()` raises, on this process too; where another one failed it says so."""
    with pytest.raises(kind, match=message):
        action()


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """On the rows of this process, in the dtype of the weights."""
    dtype = next(model.parameters()).dtype
    for step in range(first, last):
        x, y = (share(part).to(dtype) for part in batch(0, step))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x).float(), y.float()).backward()
        optimizer.step()


def waiting(wrapped: nn.Module, more: bool) -> Any:
    """Leaves the averaging of gradients to the last piece of a step, where that can be said."""
    if hasattr(wrapped, "set_requires_gradient_sync"):
        wrapped.set_requires_gradient_sync(not more)
    return wrapped.no_sync() if more and hasattr(wrapped, "no_sync") else nullcontext()


def train(
    model: nn.Module,
    config: SculptConfig,
    wrap: Any = lambda model: model,
    *,
    accumulate: int = 1,
    tasks: int = 2,
    steps: int = STEPS,
) -> dict[str, Any]:
    """Losses, worst leaks with their limits, and the weights at the end."""
    losses, leaks = [], []
    sculptor = Sculptor(model, config)
    for task in range(tasks):
        sculptor.begin_task()
        wrapped = wrap(model)
        optimizer = torch.optim.AdamW(sculptor.parameters(), lr=3e-3)
        sculptor.attach(optimizer)
        for step in range(steps):
            x, y = (share(part) for part in batch(task, step))
            optimizer.zero_grad()
            pieces = list(zip(x.chunk(accumulate), y.chunk(accumulate), strict=True))
            total = torch.zeros(())
            for index, (a, b) in enumerate(pieces):
                with waiting(wrapped, index + 1 < len(pieces)):
                    loss = nn.functional.mse_loss(wrapped(a), b) / accumulate
                    loss.backward()
                total += loss.detach()
            losses.append(mean(total))
            norm = torch.nn.utils.clip_grad_norm_(sculptor.parameters(), CLIP)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            assert norm > CLIP, "clipping has nothing to do"
            optimizer.step()
        with torch.no_grad():
            wrapped(x)  # An evaluation may leave weights gathered.
        certificate = sculptor.verify()
        leaks += [(row.leak, row.limit) for row in certificate.rows]
        sculptor.end_task()
    return {"losses": losses, "leaks": leaks, "weights": model.state_dict()}
