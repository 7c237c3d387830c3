"""The four projections at small ranks: two launches, each one pass over all matrices.

| form     | first launch keeps      | second launch subtracts     |
|----------|-------------------------|-----------------------------|
| `core`   | `C = Uᵀ(GV)`            | `(U C) Vᵀ`                  |
| `right`  | `Y = GV`                | `Y Vᵀ`                      |
| `left`   | `right` of `Gᵀ`         | `right` of `Gᵀ`             |
| `strict` | `Y`, `C`, `Z = GᵀU`     | `U Zᵀ + (Y - U C) Vᵀ`       |

`C` is summed from one part per program, always in the same order. Where there are many parts the
library adds them between the launches, else the second launch does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from sculpt_kernels.kernels import common
from sculpt_kernels.kernels.config import BUSY_PROGRAMS, SMALL_RANK, TileConfig, padded_rank
from sculpt_kernels.kernels.strips import apply_kernel, reduce_kernel
from sculpt_kernels.kernels.update import strides

# Parts of a core that the second launch adds up itself, instead of a sum in between.
_FEW_PARTS = 4


def supports(
    G: Tensor, U: Tensor | None, V: Tensor | None, *, precision: str = "fast"
) -> str | None:
    """`None` if `project_` can run on these, else the reason."""
    for name, B in (("U", U), ("V", V)):
        if B is not None and B.shape[-1] > SMALL_RANK:
            return (
                f"the small-rank kernels take up to {SMALL_RANK} columns; {name} has {B.shape[-1]}"
            )
    if precision == "exact" and G.dtype == torch.float32:
        return "precision='exact' is for bfloat16 and float16; float32 needs no correction"
    return common.unsupported(G, U, V)


def project_(
    G: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    form: str,
    *,
    precision: str = "fast",
    reduce_config: TileConfig | None = None,
    apply_config: TileConfig | None = None,
) -> Tensor:
    """Project `G` in place at ranks up to 128; returns `G`.

    Args:
        G: `(..., m, n)`, float32, bfloat16 or float16, any strides.
        U: `(..., m, r)`; V: `(..., n, s)`, dtype of `G`; two-dimensional to share over the batch;
            `None` where the form has no such side. No columns on a side leave that side alone.
        form: `"core"`, `"strict"`, `"left"`, `"right"`.
        precision: `"fast"`, or for 16-bit dtypes `"exact"`: cores corrected by `(UᵀU)⁻¹` and
            `(VᵀV)⁻¹`, intermediates kept as two 16-bit parts, so that the projector is exact on
            the span of the rounded basis and only the last rounding of `G` is left.
        reduce_config, apply_config: tile configurations, instead of the table's.

    Bytes: three passes over `G`, four for `strict`, and the bases. FLOPs, for `r = s`:
    `4 m n r`, `8 m n r` for `strict`, and terms in `r²`; about 1.5 times that for `"exact"`.
    """
    if G.numel() == 0:
        return G
    for _, (g, u, v) in common.batches(G, U, V):
        _project(g, u, v, form, precision, reduce_config, apply_config, None)
    return G


def project_many_(
    Gs: Sequence[Tensor],
    Us: Sequence[Tensor | None],
    Vs: Sequence[Tensor | None],
    form: str,
    *,
    precision: str = "fast",
    reduce_config: TileConfig | None = None,
    apply_config: TileConfig | None = None,
) -> None:
    """`project_` for matrices of one shape, dtype and device, each where it lies, in place.

    Two launches for all of them, through tables of addresses that are kept for the next call with
    the same tensors. `Gs[i]` `(m, n)`, `Us[i]` `(m, r)`, `Vs[i]` `(n, s)`. Matrices whose strides
    differ, or whose memory is not aligned to 16 bytes, go in launches of their own.
    """
    groups: dict[Any, list[tuple[Tensor, Tensor | None, Tensor | None]]] = {}
    for alone, triple in enumerate(zip(Gs, Us, Vs, strict=True)):
        present = [X for X in triple if X is not None]
        aligned = all(X.data_ptr() % 16 == 0 for X in present)
        layout = tuple((X.shape, X.stride()) for X in present)
        groups.setdefault((layout, -1 if aligned else alone), []).append(triple)
    options = (precision, reduce_config, apply_config)
    for triples in groups.values():
        G, U, V = triples[0]
        if len(triples) == 1 or G.ndim != 2:
            for g, u, v in triples:
                project_(
                    g, u, v, form, precision=precision,
                    reduce_config=reduce_config, apply_config=apply_config,
                )  # fmt: skip
        elif G.numel():
            one = [None if X is None else X[None] for X in (G, U, V)]
            assert one[0] is not None
            _project(one[0], one[1], one[2], form, *options, triples)


def _project(
    G: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    form: str,
    precision: str,
    reduce_config: TileConfig | None,
    apply_config: TileConfig | None,
    table: list[tuple[Tensor, Tensor | None, Tensor | None]] | None,
) -> None:
    """Three-dimensional views, or the first of many matrices and the `table` of all."""
    form = _form_at_ranks(U, V, form)
    if form == "none":
        return
    # The kernels walk along rows; the transpose swaps the sides of the forms that have both.
    transposed = form == "left" or (form != "right" and G.stride(-1) != 1 and G.stride(-2) == 1)
    if transposed:
        G, U, V = G.mT, V, U
        table = None if table is None else [(g.mT, v, u) for g, u, v in table]
    right = V
    assert right is not None
    left = right if U is None or form in ("left", "right") else U
    core = form in ("core", "strict")
    sides = {"core": 0, "strict": 2}.get(form, 1)
    exact = precision == "exact"
    count, m, n = G.shape
    if table is not None:
        count = len(table)
    first = common.choose("reduce", G.dtype, G.device, reduce_config)
    second = common.choose("apply", G.dtype, G.device, apply_config)
    chunk = chunk_length(count, m, n, first) if sides == 0 else n
    parts = triton.cdiv(m, first.block_m) * triton.cdiv(n, chunk)
    r, s = left.shape[-1], right.shape[-1]
    kept = torch.float32 if exact else G.dtype
    nothing = G.new_empty(0)
    Y = G.new_empty(count, m, s, dtype=kept) if sides else nothing
    Z = G.new_empty(count, n, r, dtype=kept) if sides == 2 else nothing
    C = G.new_empty(count, parts, r, s, dtype=torch.float32) if core else nothing
    shared = arguments(G, left, right, table, m, n, core, sides, exact)
    programs = parts + (triton.cdiv(n, first.block_m) if sides == 2 else 0)
    common.launch(
        reduce_kernel,
        count * programs,
        first,
        G.device,
        Y=Y,
        Z=Z,
        C=C,
        chunk=chunk,
        BLOCK_M=first.block_m,
        BLOCK_K=first.block_k,
        **shared,
    )
    if core and (parts > _FEW_PARTS or exact):
        C, parts = C.sum(1, keepdim=True), 1
    if exact:
        Y, Z, C = _correct(Y, Z, C, left, right, table, core, sides)
    chunk = chunk_length(count, m, n, second)
    common.launch(
        apply_kernel,
        count * triton.cdiv(m, second.block_m) * triton.cdiv(n, chunk),
        second,
        G.device,
        Y=Y,
        Z=Z,
        C=C,
        parts=parts,
        chunk=chunk,
        BLOCK_M=second.block_m,
        BLOCK_N=second.block_n,
        **shared,
    )


def _form_at_ranks(U: Tensor | None, V: Tensor | None, form: str) -> str:
    """The form that is left when a side has no columns; `"none"` is the identity."""
    left = U is not None and U.shape[-1] > 0 and form != "right"
    right = V is not None and V.shape[-1] > 0 and form != "left"
    if left and right:
        return form
    if form == "core":
        return "none"
    return "left" if left else "right" if right else "none"


def chunk_length(count: int, m: int, n: int, config: TileConfig) -> int:
    """Columns that one program walks: fewer where strips of rows alone leave the device idle.

    At least eight ranks' worth, so that the work per chunk that grows with `r²` stays small.
    """
    strips = count * triton.cdiv(m, config.block_m)
    chunks = max(1, min(BUSY_PROGRAMS // max(1, strips), n // (8 * config.block_n)))
    step = max(config.block_n, config.block_k)
    steps: int = triton.cdiv(triton.cdiv(n, chunks), step)
    return steps * step


def arguments(
    G: Tensor,
    U: Tensor,
    V: Tensor,
    table: list[tuple[Tensor, Tensor | None, Tensor | None]] | None,
    m: int,
    n: int,
    core: bool,
    sides: int,
    exact: bool,
) -> dict[str, Any]:
    """What the two kernels take alike."""
    places: tuple[Tensor, Tensor, Tensor] = (G, U, V)
    if table is not None:
        columns = [[B if B is not None else V for B in side] for side in zip(*table, strict=True)]
        if not core:
            columns[1] = columns[2]
        pointers = [tuple(X.data_ptr() for X in side) for side in columns]
        places = tuple(address_table(side, G.device) for side in pointers)  # type: ignore[assignment]
    return {
        "G": places[0],
        "U": places[1],
        "V": places[2],
        "m": m,
        "n": n,
        "r": U.shape[-1],
        "s": V.shape[-1],
        **strides("g", "lmn", G),
        **strides("u", "lmr", U),
        **strides("v", "lns", V),
        "CORE": core,
        "SIDES": sides,
        "EXACT": exact,
        "TABLE": table is not None,
        "DTYPE": common.triton_dtype(G.dtype),
        "PRECISION": common.input_precision(G.dtype),
        "LEFT_RANK": padded_rank(U.shape[-1]),
        "RIGHT_RANK": padded_rank(V.shape[-1]),
    }


@lru_cache(maxsize=256)
def address_table(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    """Addresses of many tensors, on their device; built once, so graphs can be captured."""
    return torch.tensor(pointers, dtype=torch.int64, device=device)


def _correct(
    Y: Tensor,
    Z: Tensor,
    C: Tensor,
    U: Tensor,
    V: Tensor,
    table: list[tuple[Tensor, Tensor | None, Tensor | None]] | None,
    core: bool,
    sides: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Put `(UᵀU)⁻¹` and `(VᵀV)⁻¹` where the plain formulas assume the identity."""
    if table is not None:
        V = torch.stack([v for _, _, v in table if v is not None])
        if core:
            U = torch.stack([u for _, u, _ in table if u is not None])
    right = inverse_gram(V)
    if sides:
        Y = Y @ right
    if core:
        left = inverse_gram(U)
        C = left[:, None] @ C @ right[:, None]
        if sides == 2:
            Z = Z @ left
    return Y, Z, C


def inverse_gram(B: Tensor) -> Tensor:
    """`(BᵀB)⁻¹` in float32; for a rounded orthonormal basis it is close to the identity."""
    wide = B.float()
    inverse: Tensor = torch.linalg.inv(wide.mT @ wide)
    return inverse
