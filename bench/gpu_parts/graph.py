"""Every operation captured into a CUDA graph: replays have the bits of eager calls.

Between replays matrices, rates, steps and seeds change on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.checks import random
from bench.gpu_parts.run import Run
from sculpt_kernels import (
    compress,
    expand_add_,
    expand_add_many_,
    project_,
    project_adamw_,
    project_many_,
)

M, N, RANK, LARGE = 512, 768, 64, 192
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Operation:
    """`call` changes the tensors that `fresh` makes, always with the same values."""

    name: str
    fresh: Callable[[], list[Tensor]]
    call: Callable[[list[Tensor]], object]


@dataclass(frozen=True)
class Scalars:
    """What changes between replays, on the device."""

    rate: Tensor
    step: Tensor
    seeds: Tensor

    def set(self, number: int) -> None:
        self.rate.fill_(1e-2 / number)
        self.step.fill_(number)
        self.seeds.copy_(torch.arange(3, device=self.seeds.device) + 2**40 * number)


def part_graph(run: Run) -> None:
    if not run.needs_device("graph"):
        return
    scalars = new_scalars(run.device)
    for operation in operations(run.device, scalars):
        what, measure = f"replay {operation.name}", partial(_differing, operation, scalars)
        run.attempt(what, 5.0, run.checked, what, measure, 0.0)
    for name, dtype in (("float32", FP32), ("bfloat16", BF16)):
        what, measure = "replay step", partial(_steps_differ, run.device, dtype)
        run.attempt(f"{what} {name}", 8.0, run.checked, what, measure, 0.0, name)
    same = [c for c in run.results["checks"] if c["what"].startswith("replay")]
    print(f"replays: {sum(c['ok'] for c in same)} of {len(same)} equal eager calls", flush=True)


def _differing(operation: Operation, scalars: Scalars) -> float:
    """How many elements differ after three replays."""
    eager, replayed = operation.fresh(), operation.fresh()
    graph = _captured(lambda: operation.call(replayed), lambda: operation.call(replayed))
    for X, start in zip(replayed, operation.fresh(), strict=True):
        X.copy_(start)
    for number in (1, 2, 3):
        scalars.set(number)
        operation.call(eager)
        graph.replay()
        for X, Y in zip(eager, replayed, strict=True):
            new = torch.randn_like(X, dtype=FP32).abs_().mul_(1e-3)
            X.add_(new)
            Y.add_(new)
    torch.cuda.synchronize()
    return float(sum(int((X != Y).sum()) for X, Y in zip(eager, replayed, strict=True)))


def _steps_differ(device: torch.device, dtype: torch.dtype) -> float:
    """Whether replays of a captured step of the compact engine differ from eager ones.

    Forward, backward, fused AdamW and the update of the weights; the last batch is not finite, so
    that both must leave a step out.
    """
    # Here, so that the other parts run where sculpt needs what is not installed.
    from bench.gpu_parts.steps import Training

    eager, captured = Training(device, dtype), Training(device, dtype)
    graph = _captured(lambda: [task.step() for task in (eager, captured)], captured.step)
    for batch in range(4):
        for task in (eager, captured):
            task.load(batch, scale=float("nan") if batch == 3 else 1.0)
        eager.step()
        graph.replay()
    return float(not (eager.moved and all(map(torch.equal, eager.state(), captured.state()))))


def _captured(warm_up: Callable[[], object], call: Callable[[], object]) -> Any:
    """A graph of `call`, after three rounds of `warm_up` on another stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            warm_up()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def new_scalars(device: torch.device) -> Scalars:
    scalars = Scalars(
        torch.zeros((), device=device),
        torch.zeros((), dtype=torch.int64, device=device),
        torch.zeros(3, dtype=torch.int64, device=device),
    )
    scalars.set(1)
    return scalars


def operations(device: torch.device, scalars: Scalars | None = None) -> Iterator[Operation]:
    """All of them, on one shape."""
    now = scalars or new_scalars(device)

    def basis(size: int, rank: int, dtype: torch.dtype) -> Tensor:
        return random(device, size, rank, dtype=dtype, basis=True)

    def matrices(count: int, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
        def fresh() -> list[Tensor]:
            generator = torch.Generator(device).manual_seed(1)
            return [
                torch.rand(M, N, device=device, generator=generator).to(dtype) for _ in range(count)
            ]

        return fresh

    def projection(name: str, rank: int, form: str, dtype: torch.dtype) -> Operation:
        U = None if form == "right" else basis(M, rank, dtype)
        V = None if form == "left" else basis(N, rank, dtype)

        def call(X: list[Tensor]) -> None:
            project_(X[0], U, V, form=form)

        return Operation(name, matrices(1, dtype), call)

    for form in ("core", "strict", "left", "right"):
        yield projection(f"{form} small", RANK, form, BF16)
    yield projection("core small float32", RANK, "core", FP32)
    for form in ("core", "strict"):
        yield projection(f"{form} library", LARGE, form, BF16)
    U, V = basis(M, RANK, BF16), basis(N, RANK, BF16)
    yield Operation("many", matrices(3, BF16), lambda X: project_many_(X, [U] * 3, [V] * 3))
    C = random(device, RANK, RANK)
    yield Operation(
        "compress",
        lambda: [*matrices(1, BF16)(), torch.zeros_like(C)],
        lambda X: X[1].copy_(compress(X[0], U, V)),
    )
    yield Operation(
        "expand_add",
        matrices(1, BF16),
        lambda X: expand_add_(X[0], C, U, V, alpha=now.rate, rounding="stochastic",
                              seed=now.seeds[0]),
    )  # fmt: skip
    yield Operation(
        "expand_add many",
        matrices(3, BF16),
        lambda X: expand_add_many_(X, [C] * 3, [U] * 3, [V] * 3, alpha=now.rate,
                                   rounding="stochastic", seeds=now.seeds),
    )  # fmt: skip
    for kind in ("update", "gradient"):
        yield Operation(f"adamw {kind}", matrices(4, FP32), _adamw(U, V, now, kind))


def _adamw(U: Tensor, V: Tensor, now: Scalars, kind: str) -> Callable[[list[Tensor]], object]:
    def call(X: list[Tensor]) -> None:
        G = X[3].to(BF16)
        project_adamw_(X[0], G, X[1], X[2], U, V, project=kind, lr=now.rate, step=now.step)

    return call
