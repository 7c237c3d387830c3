"""Matrices of more than 2**31 elements: places in them do not fit 32 bits.

What is computed last, in the last rows, is compared with float64; a place that wrapped around would
leave these rows as they were, or end in an illegal access.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.checks import off, random
from bench.gpu_parts.run import Run
from sculpt_kernels import compress, expand_add_, project_, project_adamw_, reference
from sculpt_kernels.subspaces.sketch import sketch

COLUMNS, ROWS, RANK = 32768, 2**16 + 2**10, 32
TAIL = 256
BF16 = torch.bfloat16


def part_huge(run: Run) -> None:
    if not run.needs_device("huge"):
        return
    checks: dict[str, Callable[[Run], float]] = {
        "project": _project,
        "compress": _compress,
        "expand_add": _expand_add,
        "adamw": _adamw,
        "sketch": _sketch,
    }
    for name, check in checks.items():
        limit = 0.0 if name == "sketch" else 2e-2 if name != "compress" else 1e-3
        run.attempt(f"huge {name}", 8.0, run.checked, f"huge {name}", partial(check, run), limit)
    done = [check for check in run.results["checks"] if check["what"].startswith("huge")]
    print(f"huge: {sum(check['ok'] for check in done)} of {len(done)} passed", flush=True)


def _operands(run: Run) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`G`, `U`, `V`, and the last rows of `G` and `U` in float64.

    `U` is zero but for the last rows, and half of `G` there lies in the subspaces, so that hardly
    anything that is computed is elsewhere.
    """
    G = torch.empty(ROWS, COLUMNS, device=run.device, dtype=BF16)
    assert G.numel() > 2**31
    for rows in G.split(2**13):
        rows.normal_()
    U = torch.zeros(ROWS, RANK, device=run.device, dtype=BF16)
    U[-TAIL:] = random(run.device, TAIL, RANK, basis=True)
    V = random(run.device, COLUMNS, RANK, dtype=BF16, basis=True)
    left = U[-TAIL:].double()
    G[-TAIL:] += (left @ _core(run).double() @ V.double().T).to(BF16)
    return G, U, V, G[-TAIL:].double(), left


def _core(run: Run) -> Tensor:
    """Coordinates of a matrix whose last rows have entries of about one."""
    return random(run.device, RANK, RANK) * (TAIL * COLUMNS) ** 0.5 / RANK


def _project(run: Run) -> float:
    G, U, V, tail, left = _operands(run)
    want = tail - left @ (left.T @ (tail @ V.double())) @ V.double().T
    project_(G, U, V)
    return off(G[-TAIL:], want)


def _compress(run: Run) -> float:
    G, U, V, tail, left = _operands(run)
    return off(compress(G, U, V), left.T @ (tail @ V.double()))


def _expand_add(run: Run) -> float:
    W, U, V, tail, left = _operands(run)
    C = _core(run)
    expand_add_(W, C, U, V, rounding="stochastic", seed=1)
    return off(W[-TAIL:], reference.expand_add(tail, C.double(), left, V.double(), 1.0))


def _adamw(run: Run) -> float:
    """From moments of zero and a weight of zero, so that the step is all that there is."""
    G, U, V, tail, left = _operands(run)
    W, first, second = (torch.zeros_like(G, dtype=torch.float32) for _ in range(3))
    options = {"lr": 1.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "step": 1}
    direction = tail / (tail.abs() + 1e-8)
    want = left @ (left.T @ (direction @ V.double())) @ V.double().T - direction
    project_adamw_(W, G, first, second, U, V, form="core", project="update", **options)
    return off(W[-TAIL:], want)


def _sketch(run: Run) -> float:
    """The last rows have the bits that a CPU draws for them."""
    rows, columns = 2**26 + 2**12, 33
    drawn = sketch(rows, columns, 5, dtype=torch.float32, device=run.device)
    assert drawn.numel() > 2**31
    want = sketch(TAIL, columns, 5, row0=rows - TAIL, dtype=torch.float32,
                  device=torch.device("cpu"))  # fmt: skip
    return float((drawn[-TAIL:].cpu() != want).sum())
