"""Every operation against float64 from the same rounded inputs; random bits against a CPU's.

What is off is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import cases as C
from sculpt_kernels import (
    compress,
    expand_add_,
    orthonormalize,
    project,
    project_adamw_,
    project_many_,
    reference,
)
from sculpt_kernels.rounding import stochastic_round
from sculpt_kernels.subspaces.sketch import sketch

FORMS = ("core", "strict", "left", "right")
# Rows, columns, left and right rank: ragged, small, padded, wide, tall, and beyond small ranks.
SMALL = [(48, 80, 12, 9), (37, 53, 7, 5)]
LARGE = [(1000, 1536, 100, 128), (1536, 1000, 300, 200), (2048, 2048, 1024, 1024)]

# Larger matrices would take minutes in float64; what depends on size is left to the tests.
LARGEST = 2**22

Check = tuple[str, str, Callable[[], float], float]
"""What is checked, the dtype, how its error is found, and the limit of that."""


def incorrect(case: C.Case, device: torch.device) -> str | None:
    """The reason not to time this case, or `None`."""
    m, n = case.shape
    if m * n > LARGEST:
        return None
    operands = (m, n, case.rank, case.rank)
    for what, _, measure, limit in of_shape(device, case.dtype, C.DTYPES[case.dtype], operands):
        if what.split()[0] == case.name.split()[0] and not (error := measure()) <= limit:
            return f"{what}: error {error:.1e} above {limit:.1e}"
    return None


def checks(device: torch.device, tiny: bool) -> Iterator[Check]:
    yield from _bits(device)
    for dtype_name, dtype in C.DTYPES.items():
        if dtype == torch.float16 and device.type == "cpu":
            continue
        for shape in SMALL if tiny else (*SMALL, *LARGE):
            yield from of_shape(device, dtype_name, dtype, shape)


def of_shape(
    device: torch.device, name: str, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> Iterator[Check]:
    m, n, r, s = shape
    unit = torch.finfo(dtype).eps / 2
    # float32 products may run in TF32 inside a kernel; 16-bit ones round two intermediates.
    limit = 4 * unit if dtype != torch.float32 else 2e-6
    G = random(device, m, n, dtype=dtype)
    U, V = (random(device, *size, dtype=dtype, basis=True) for size in ((m, r), (n, s)))
    size = f"{m}x{n} r={r},{s}"
    for form in FORMS:
        given = (G, None if form == "right" else U, None if form == "left" else V)
        yield f"{form} {size}", name, partial(_project, *given, form), limit
        yield f"{form} many {size}", name, partial(_many, *given, form), limit
    yield f"compress {size}", name, partial(_compress, G, U, V), 2e-5
    yield f"expand_add {size}", name, partial(_expand_add, G, U, V), unit + 2e-5
    for kind in ("update", "gradient"):
        yield f"adamw {kind} {size}", name, partial(_adamw, G, U, V, kind), 16 * unit + 1e-4


def random(
    device: torch.device, *shape: int, dtype: torch.dtype = torch.float32, basis: bool = False
) -> Tensor:
    X = torch.randn(*shape, device=device)
    return (orthonormalize(X) if basis else X).to(dtype)


def off(got: Tensor, want: Tensor) -> float:
    """Relative error; infinite where anything is not finite."""
    error = float((got.double() - want).norm() / want.norm())
    return error if error == error else float("inf")


def _wide(*tensors: Tensor | None) -> list[Any]:
    return [None if X is None else X.double() for X in tensors]


def _project(G: Tensor, U: Tensor | None, V: Tensor | None, form: str) -> float:
    want = reference.project(*_wide(G, U, V), form)
    return off(project(G, U, V, form=form), want)


def _many(G: Tensor, U: Tensor | None, V: Tensor | None, form: str) -> float:
    want = reference.project(*_wide(G, U, V), form)
    many = [G.clone() for _ in range(3)]
    project_many_(many, [U] * 3, [V] * 3, form=form)
    return max(off(X, want) for X in many)


def _compress(G: Tensor, U: Tensor, V: Tensor) -> float:
    """Beside the norm of `G`, of which the coordinates are a part."""
    core = reference.compress(*_wide(G, U, V))
    return off(compress(G, U, V), core) * float(core.norm() / G.double().norm())


def _expand_add(G: Tensor, U: Tensor, V: Tensor) -> float:
    C = random(G.device, U.shape[1], V.shape[1])
    want = reference.expand_add(G.double(), C.double(), U.double(), V.double(), 0.5)
    return off(expand_add_(G.clone(), C, U, V, alpha=0.5), want)


def _adamw(G: Tensor, U: Tensor, V: Tensor, kind: str) -> float:
    state = [random(G.device, *G.shape) for _ in range(3)]
    state[2].square_()
    given = (state[0], G, *state[1:], U, V)
    options = {"form": "core", "project": kind, **C.ADAMW} | {"lr": 1e-2}
    want = reference.project_adamw(*(X.double() for X in given), **options)
    before = state[0].double()
    project_adamw_(*given, **options)
    # The step matters, not the weight it is added to.
    return off(state[0].double() - before, want[0] - before)


def _bits(device: torch.device) -> Iterator[Check]:
    """What is drawn at random has the bits that a CPU draws; the error counts those that differ."""
    yield "sketch bits", "float32", partial(_sketch_bits, device), 0.0
    for name in ("bfloat16", "float16"):
        yield "expand_add bits", name, partial(_rounding_bits, device, C.DTYPES[name]), 0.0


def _sketch_bits(device: torch.device) -> float:
    on_cpu, drawn = (
        sketch(1000, 72, 2**40 + 7, dtype=torch.float32, device=where)
        for where in (torch.device("cpu"), device)
    )
    return float((drawn.cpu() != on_cpu).sum())


def _rounding_bits(device: torch.device, dtype: torch.dtype) -> float:
    X = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    want = stochastic_round(X, dtype, 2**40 + 7)
    W = torch.zeros(300, 200, dtype=dtype, device=device)
    none = torch.zeros(0, 0, device=device)
    U, V = (torch.zeros(size, 0, dtype=dtype, device=device) for size in X.shape)
    expand_add_(W, none, U, V, base=X.to(device), rounding="stochastic", seed=2**40 + 7)
    return float((W.cpu().view(torch.int16) != want.view(torch.int16)).sum())
