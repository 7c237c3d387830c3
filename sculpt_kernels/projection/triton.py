"""The four projections at small ranks: two launches, each one pass over all matrices.

| form     | first launch keeps      | second launch subtracts     |
|----------|-------------------------|-----------------------------|
| `core`   | `C = Uᵀ(GV)`            | `(U C) Vᵀ`                  |
| `right`  | `Y = GV`                | `Y Vᵀ`                      |
| `left`   | `right` of `Gᵀ`         | `right` of `Gᵀ`             |
| `strict` | `Y`, `C`, `Z = GᵀU`     | `U Zᵀ + (Y - U C) Vᵀ`       |

`C` is summed from one part per program, always in the same order. Where there are many parts the
library adds them between the launches, else the second launch does. For float32 the first launch
keeps `Y`, the library multiplies it by `U Uᵀ`, and the second launch is `update_`: a product of
float32 keeps its operands in registers, so the ranks have to come in steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from sculpt_kernels.projection.triton_kernels import apply_kernel, reduce_kernel
from sculpt_kernels.triton import launcher
from sculpt_kernels.triton.tiles import BUSY_PROGRAMS, padded_rank
from sculpt_kernels.triton.update import update_, update_many_

# Parts of a core that the second launch adds up itself, instead of a sum in between.
_FEW_PARTS = 4

Operand = tuple[Tensor, Tensor | None, Tensor | None]


def project_(G: Tensor, U: Tensor | None, V: Tensor | None, form: str) -> Tensor:
    """`sculpt_kernels.project_` at ranks from 1 to 128, in 16-bit dtypes and float32.

    Bytes: three passes over `G`, four for `strict`, and the bases. FLOPs, for `r = s`:
    `4 m n r`, `8 m n r` for `strict`, and terms in `r²`.
    """
    if G.numel() == 0:
        return G
    for _, (g, u, v) in launcher.batches(G, U, V):
        _project(g, u, v, form, None)
    return G


def project_many_(operands: Sequence[Operand], form: str) -> None:
    """`project_` for the `(G, U, V)` of matrices `(m, n)`, each where it lies.

    Two launches for those of one layout, through tables of addresses that are kept for the next
    call with the same tensors. Memory that is not aligned to 16 bytes has launches of its own.
    """
    groups: dict[Any, list[Operand]] = {}
    for alone, triple in enumerate(operands):
        present = [X for X in triple if X is not None]
        aligned = all(X.data_ptr() % 16 == 0 for X in present)
        layout = tuple((X.shape, X.stride(), X.dtype, X.device) for X in present)
        groups.setdefault((layout, -1 if aligned else alone), []).append(triple)
    for triples in groups.values():
        G, U, V = triples[0]
        if len(triples) == 1:
            project_(G, U, V, form)
        else:
            u, v = (None if B is None else B[None] for B in (U, V))
            _project(G[None], u, v, form, triples)


def _project(
    G: Tensor, U: Tensor | None, V: Tensor | None, form: str, table: list[Operand] | None
) -> None:
    """Three-dimensional views, or the first of many matrices and the `table` of all."""
    # The kernels walk along rows; the transpose swaps the sides of the forms that have both.
    transposed = form == "left" or (form != "right" and G.stride(-1) != 1 and G.stride(-2) == 1)
    if transposed:
        G, U, V = G.mT, V, U
        table = None if table is None else [(g.mT, v, u) for g, u, v in table]
    assert V is not None
    left = V if U is None or form in ("left", "right") else U
    operands = Operands(G, left, V, form, table)
    if G.dtype == torch.float32:
        _project_float32(operands)
    else:
        _project_low_precision(operands)


@dataclass(frozen=True)
class Operands:
    """Matrices of one launch, ready to be walked along their rows."""

    G: Tensor
    U: Tensor
    V: Tensor
    form: str
    table: list[Operand] | None = None

    @property
    def count(self) -> int:
        return self.G.shape[0] if self.table is None else len(self.table)

    @property
    def core(self) -> bool:
        return self.form in ("core", "strict")

    @property
    def sides(self) -> int:
        """Which products with `G` are kept whole, in the numbers of `reduce_kernel`."""
        return {"core": 0, "strict": 2}.get(self.form, 1)

    def bases(self) -> tuple[Tensor, Tensor]:
        """All left and right bases as `(L, m, r)` and `(L, n, s)` tensors."""
        if self.table is None:
            return self.U, self.V
        right = torch.stack([v for _, _, v in self.table if v is not None])
        left = right
        if self.core:
            left = torch.stack([u for _, u, _ in self.table if u is not None])
        return left, right

    def arguments(self, kernel: Any) -> dict[str, Any]:
        """What both kernels take of them."""
        G, U, V = self.G, self.U, self.V
        found = launcher.operands(kernel, g=G, u=U, v=V)
        if self.table is not None:
            gs, us, vs = zip(*self.table, strict=True)
            for name, side in (("G", gs), ("U", us if self.core else vs), ("V", vs)):
                pointers = tuple(X.data_ptr() for X in side)
                found[name] = launcher.address_table(pointers, G.device)
        return found | {
            "m": G.shape[1],
            "n": G.shape[2],
            "r": U.shape[-1],
            "s": V.shape[-1],
            "TABLE": self.table is not None,
            "DTYPE": launcher.TRITON_DTYPES[G.dtype],
            "PRECISION": launcher.input_precision(G.dtype),
            "LEFT_RANK": padded_rank(U.shape[-1]),
            "RIGHT_RANK": padded_rank(V.shape[-1]),
        }


def _project_low_precision(operands: Operands) -> None:
    G, core, sides = operands.G, operands.core, operands.sides
    _, m, n = G.shape
    Y, Z, C = reduce(operands, sides, core, exact=False)
    parts = C.shape[1] if core else 1
    if parts > _FEW_PARTS:
        C, parts = C.sum(1, keepdim=True), 1
    config = launcher.choose("apply both" if sides == 2 else "apply", G.dtype, G.device)
    chunk = chunk_length(operands.count, m, n, config.block_m, config.block_n)
    launcher.launch(
        apply_kernel,
        operands.count * triton.cdiv(m, config.block_m) * triton.cdiv(n, chunk),
        config,
        G.device,
        Y=Y,
        Z=Z,
        C=C,
        parts=parts,
        chunk=chunk,
        CORE=core,
        SIDES=sides,
        **operands.arguments(apply_kernel),
    )


def _project_float32(operands: Operands) -> None:
    Y, Z, _ = reduce(operands, max(1, operands.sides), False, exact=False)
    U, V = operands.bases()
    if operands.core:
        inside_left = U @ (U.mT @ Y)
        Y = inside_left if operands.form == "core" else Y - inside_left
    A2, B2 = (U, Z) if operands.sides == 2 else (None, None)
    if operands.table is None:
        update_(operands.G, Y, V, alpha=-1.0, A2=A2, B2=B2)
    else:
        update_many_([g for g, _, _ in operands.table], Y, V, alpha=-1.0, A2=A2, B2=B2)


def reduce(
    operands: Operands, sides: int, core: bool, *, exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`Y = G V`, `Z = Gᵀ U` and the parts of `C = Uᵀ Y`, as far as they are asked for.

    16-bit `Y` enter `C` as two 16-bit parts where that is to be `exact`.
    """
    G, r, s = operands.G, operands.U.shape[-1], operands.V.shape[-1]
    config = launcher.choose("reduce", G.dtype, G.device)
    _, m, n = G.shape
    count = operands.count
    chunk = n if sides else chunk_length(count, m, n, config.block_m, config.block_k)
    parts = triton.cdiv(m, config.block_m) * triton.cdiv(n, chunk)
    Y = G.new_empty((count, m, s) if sides else 0)
    Z = G.new_empty((count, n, r) if sides == 2 else 0)
    C = G.new_empty((count, parts, r, s) if core else 0, dtype=torch.float32)
    launcher.launch(
        reduce_kernel,
        count * (parts + (triton.cdiv(n, config.block_m) if sides == 2 else 0)),
        config,
        G.device,
        Y=Y,
        Z=Z,
        C=C,
        chunk=chunk,
        CORE=core,
        SIDES=sides,
        EXACT=exact,
        **operands.arguments(reduce_kernel),
    )
    return Y, Z, C


def chunk_length(count: int, m: int, n: int, block_m: int, block_n: int) -> int:
    """Columns that one program walks: fewer where blocks of rows alone leave the device idle.

    At least 1024, so that the work per chunk that grows with `r²` stays small.
    """
    blocks = count * triton.cdiv(m, block_m)
    chunks = max(1, min(BUSY_PROGRAMS // max(1, blocks), n // 1024))
    steps: int = triton.cdiv(triton.cdiv(n, chunks), block_n)
    return steps * block_n
