"""Every operation against float64 from the same rounded inputs; random bits against a CPU's."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench import cases as C
from bench.gpu_parts.run import Run, off, random
from sculpt_kernels import (
    compress,
    expand_add_,
    project,
    project_adamw_,
    project_many_,
    reference,
)
from sculpt_kernels.rounding import stochastic_round
from sculpt_kernels.sketch import sketch

FORMS = ("core", "strict", "left", "right")
# Rows, columns, left and right rank: ragged, small, padded, wide, tall, and beyond small ranks.
SMALL = [(48, 80, 12, 9), (37, 53, 7, 5)]
LARGE = [(1000, 1536, 100, 128), (1536, 1000, 300, 200), (2048, 2048, 1024, 1024)]

Error = tuple[str, str, float, float]
"""What was checked, the dtype, the error and its limit."""


def part_checks(run: Run) -> None:
    for name, dtype, error, limit in errors(run):
        run.check(name, error, limit, dtype)
    checks = run.results["checks"]
    print(f"checks: {sum(c['ok'] for c in checks)} of {len(checks)} passed", flush=True)


def errors(run: Run) -> Iterator[Error]:
    yield from _bits(run.device)
    for dtype_name, dtype in C.DTYPES.items():
        if dtype == torch.float16 and run.device.type == "cpu":
            continue
        for shape in SMALL if run.options.tiny else (*SMALL, *LARGE):
            yield from of_shape(run.device, dtype_name, dtype, shape)


def of_shape(
    device: torch.device, name: str, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> Iterator[Error]:
    m, n, r, s = shape
    unit = torch.finfo(dtype).eps / 2
    # float32 products may run in TF32 inside a kernel; 16-bit ones round two intermediates.
    limit = 4 * unit if dtype != torch.float32 else 2e-6
    G = random(device, m, n, dtype=dtype)
    U, V = (random(device, *size, dtype=dtype, basis=True) for size in ((m, r), (n, s)))
    wide = G.double(), U.double(), V.double()
    size = f"{m}x{n} r={r},{s}"
    for form in FORMS:
        A, B = (None if form == "right" else U), (None if form == "left" else V)
        want = reference.project(
            wide[0], None if A is None else wide[1], None if B is None else wide[2], form
        )
        yield f"{form} {size}", name, off(project(G, A, B, form=form), want), limit
        if device.type == "cuda":
            got = project(G, A, B, form=form, backend="triton")
            yield f"{form} triton {size}", name, off(got, want), limit
        many = [G.clone() for _ in range(3)]
        project_many_(many, [A] * 3, [B] * 3, form=form)
        yield f"{form} many {size}", name, max(off(X, want) for X in many), limit
    exact = project(G, U, V, precision="exact")
    P, Q = (B @ torch.linalg.solve(B.T @ B, B.T) for B in wide[1:])
    yield f"exact {size}", name, off(exact, wide[0] - P @ wide[0] @ Q), limit
    core = reference.compress(*wide)
    scale = float(wide[0].norm() / core.norm())
    yield f"compress {size}", name, off(compress(G, U, V), core) / scale, 2e-5
    coordinates = random(device, r, s)
    W = expand_add_(G.clone(), coordinates, U, V, alpha=0.5)
    want = reference.expand_add(wide[0], coordinates.double(), *wide[1:], 0.5)
    yield f"expand_add {size}", name, off(W, want), unit + 2e-5
    yield from _adamw(device, name, G, U, V, size, unit)


def _adamw(
    device: torch.device, dtype: str, G: Tensor, U: Tensor, V: Tensor, size: str, unit: float
) -> Iterator[Error]:
    for kind in ("update", "gradient"):
        state = [random(device, *G.shape) for _ in range(3)]
        state[2].square_()
        given = (state[0], G, *state[1:], U, V)
        options = {"form": "core", "project": kind, **C.ADAMW} | {"lr": 1e-2}
        want = reference.project_adamw(*(X.double() for X in given), **options)
        before = state[0].double()
        project_adamw_(*given, **options)
        # The step matters, not the weight it is added to.
        error = off(state[0].double() - before, want[0] - before)
        yield f"adamw {kind} {size}", dtype, error, 16 * unit + 1e-4


def _bits(device: torch.device) -> Iterator[Error]:
    """What is drawn at random has the bits that a CPU draws; the error counts those that differ."""
    on_cpu, drawn = (
        sketch(1000, 72, 2**40 + 7, dtype=torch.float32, device=where)
        for where in (torch.device("cpu"), device)
    )
    yield "sketch bits", "float32", float((drawn.cpu() != on_cpu).sum()), 0.0
    for name in ("bfloat16", "float16"):
        dtype = C.DTYPES[name]
        X = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
        want = stochastic_round(X, dtype, 2**40 + 7)
        W = torch.zeros(300, 200, dtype=dtype, device=device)
        none = torch.zeros(0, 0, device=device)
        U, V = (torch.zeros(size, 0, dtype=dtype, device=device) for size in X.shape)
        expand_add_(W, none, U, V, base=X.to(device), rounding="stochastic", seed=2**40 + 7)
        wrong = float((W.cpu().view(torch.int16) != want.view(torch.int16)).sum())
        yield "expand_add bits", name, wrong, 0.0
