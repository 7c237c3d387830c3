"""Whether our variant of a case gives what the formula gives: what is off is not timed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.cases import ADAMW, DTYPES, Inputs
from sculpt_kernels import compress, expand_add_, project, project_adamw_, reference

# Larger matrices would take minutes in float64; what depends on size is left to the tests.
LARGEST = 2**22


def incorrect(data: Inputs) -> str | None:
    """Compare with float64 from the same inputs; the reason not to time this case, or `None`."""
    if data.G.numel() > LARGEST:
        return None
    for what, error, limit in _errors(data):
        if not error <= limit:
            return f"{what}: error {error:.1e} above {limit:.1e}"
    return None


def _errors(data: Inputs) -> Iterator[tuple[str, float, float]]:
    case = data.case
    unit = torch.finfo(DTYPES[case.dtype]).eps
    G, U, V = data.G, data.U, data.V
    wide = G.double(), U.double(), V.double()
    if case.operation == "project":
        form = case.form
        A, B = (None if form == "right" else U), (None if form == "left" else V)
        exact = [None if X is None else X.double() for X in (A, B)]
        want = reference.project(wide[0], *exact, form)
        yield form, _off(project(G, A, B, form=form), want, want), 8 * unit
    elif case.operation == "compress":
        want = reference.compress(*wide)
        # A sum over the whole matrix, accumulated in float32.
        yield "compress", _off(compress(G, U, V), want, wide[0]), 2e-5
    elif case.operation == "expand_add":
        want = reference.expand_add(wide[0], data.C.double(), *wide[1:], 0.5)
        got = expand_add_(G.clone(), data.C, U, V, alpha=0.5)
        yield "expand_add_", _off(got, want, want), unit + 2e-5
    else:
        for kind in ("update", "gradient"):
            state = [data.W.clone(), G, data.exp_avg.clone(), data.exp_avg_sq.clone()]
            want, _, _ = reference.project_adamw(
                *(X.double() for X in state), *wide[1:], project=kind, **ADAMW
            )
            project_adamw_(*state, U, V, project=kind, **ADAMW)
            # The step matters, not the weight it is added to.
            before = data.W.double()
            yield kind, _off(state[0] - data.W, want - before, want - before), 8 * unit + 1e-3


def _off(got: Tensor, want: Tensor, scale: Tensor) -> float:
    return float((got.double() - want).norm() / scale.norm())
