"""The four projections at small ranks: two launches, each one pass over all matrices.

| form     | first launch keeps      | second launch subtracts     |
|----------|-------------------------|-----------------------------|
| `core`   | `C = Uᵀ(GV)`            | `(U C) Vᵀ`                  |
| `right`  | `Y = GV`                | `Y Vᵀ`                      |
| `left`   | `right` of `Gᵀ`         | `right` of `Gᵀ`             |
| `strict` | `Y`, `C`, `Z = GᵀU`     | `U Zᵀ + (Y - U C) Vᵀ`       |

`C` is summed from one part per program, always in the same order. Where there are many parts the
library adds them between the launches, else the second launch does. For float32 the first launch
keeps `Y`, and the library multiplies it by `U Uᵀ`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from sculpt_kernels.projection.triton_strips import apply_kernel, reduce_kernel, subtract_kernel
from sculpt_kernels.triton import launcher
from sculpt_kernels.triton.tiles import BUSY_PROGRAMS, SMALL_RANK, TileConfig, padded_rank
from sculpt_kernels.triton.update import strides

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
    return launcher.unsupported(G, U, V)


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
    for _, (g, u, v) in launcher.batches(G, U, V):
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
    operands = Operands(G, left, right, form, table)
    if G.dtype == torch.float32:
        _project_float32(operands, reduce_config, apply_config)
    else:
        _project_low_precision(operands, precision == "exact", reduce_config, apply_config)


@dataclass(frozen=True)
class Operands:
    """Matrices of one launch, ready to be walked along their rows."""

    G: Tensor
    U: Tensor
    V: Tensor
    form: str
    table: list[tuple[Tensor, Tensor | None, Tensor | None]] | None

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


def _project_low_precision(
    operands: Operands,
    exact: bool,
    reduce_config: TileConfig | None,
    apply_config: TileConfig | None,
) -> None:
    G, core, sides = operands.G, operands.core, operands.sides
    _, m, n = G.shape
    Y, Z, C = reduce(operands, sides, core, exact, reduce_config)
    parts = C.shape[1] if core else 1
    if core and (parts > _FEW_PARTS or exact):
        C, parts = C.sum(1, keepdim=True), 1
    if exact:
        Y, Z, C = _correct(Y, Z, C, operands)
    name = "apply both" if sides == 2 else "apply exact" if exact else "apply"
    config = launcher.choose(name, G.dtype, G.device, apply_config)
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
        EXACT=exact,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        LEFT_RANK=padded_rank(operands.U.shape[-1]),
        RIGHT_RANK=padded_rank(operands.V.shape[-1]),
        **_arguments(operands),
    )


def _project_float32(
    operands: Operands, reduce_config: TileConfig | None, apply_config: TileConfig | None
) -> None:
    G, sides = operands.G, max(1, operands.sides)
    _, m, n = G.shape
    Y, Z, _ = reduce(operands, sides, False, False, reduce_config)
    if operands.core:
        U, _ = operands.bases()
        inside_left = U @ (U.mT @ Y)
        Y = inside_left if operands.form == "core" else Y - inside_left
    config = launcher.choose("subtract", G.dtype, G.device, apply_config)
    launcher.launch(
        subtract_kernel,
        operands.count * triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),
        config,
        G.device,
        Y=Y,
        Z=Z,
        SIDES=sides,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        **_arguments(operands),
    )


def reduce(
    operands: Operands, sides: int, core: bool, exact: bool, config: TileConfig | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`Y = G V`, `Z = Gᵀ U` and the parts of `C = Uᵀ Y`, as far as they are asked for."""
    G, U, V = operands.G, operands.U, operands.V
    config = launcher.choose("reduce", G.dtype, G.device, config)
    _, m, n = G.shape
    count, r, s = operands.count, U.shape[-1], V.shape[-1]
    block_k = config.block_k
    chunk = n if sides else chunk_length(count, m, n, config.block_m, block_k)
    parts = triton.cdiv(m, config.block_m) * triton.cdiv(n, chunk)
    kept = torch.float32 if exact else G.dtype
    Y = G.new_empty((count, m, s) if sides else 0, dtype=kept)
    Z = G.new_empty((count, n, r) if sides == 2 else 0, dtype=kept)
    C = G.new_empty((count, parts, r, s) if core else 0, dtype=torch.float32)
    programs = parts + (triton.cdiv(n, config.block_m) if sides == 2 else 0)
    launcher.launch(
        reduce_kernel,
        count * programs,
        config,
        G.device,
        Y=Y,
        Z=Z,
        C=C,
        chunk=chunk,
        CORE=core,
        SIDES=sides,
        EXACT=exact,
        BLOCK_M=config.block_m,
        BLOCK_K=block_k,
        LEFT_RANK=padded_rank(r),
        RIGHT_RANK=padded_rank(s),
        **_arguments(operands),
    )
    return Y, Z, C


def _form_at_ranks(U: Tensor | None, V: Tensor | None, form: str) -> str:
    """The form that is left when a side has no columns; `"none"` is the identity."""
    left = U is not None and U.shape[-1] > 0 and form != "right"
    right = V is not None and V.shape[-1] > 0 and form != "left"
    if left and right:
        return form
    if form == "core":
        return "none"
    return "left" if left else "right" if right else "none"


def chunk_length(count: int, m: int, n: int, block_m: int, block_n: int) -> int:
    """Columns that one program walks: fewer where strips of rows alone leave the device idle.

    At least 1024, so that the work per chunk that grows with `r²` stays small.
    """
    strips = count * triton.cdiv(m, block_m)
    chunks = max(1, min(BUSY_PROGRAMS // max(1, strips), n // 1024))
    steps: int = triton.cdiv(triton.cdiv(n, chunks), block_n)
    return steps * block_n


def _arguments(operands: Operands) -> dict[str, Any]:
    """What the kernels take alike."""
    G, U, V = places = operands.G, operands.U, operands.V
    table = operands.table
    if table is not None:
        gs, us, vs = zip(*table, strict=True)
        sides = (gs, us if operands.core else vs, vs)
        pointers = [tuple(X.data_ptr() for X in side) for side in sides]
        at_g, at_u, at_v = (launcher.address_table(side, G.device) for side in pointers)
        places = at_g, at_u, at_v
    return {
        "G": places[0],
        "U": places[1],
        "V": places[2],
        "m": G.shape[1],
        "n": G.shape[2],
        "r": U.shape[-1],
        "s": V.shape[-1],
        **strides("g", "lmn", G),
        **strides("u", "lmr", U),
        **strides("v", "lns", V),
        "TABLE": table is not None,
        "DTYPE": launcher.triton_dtype(G.dtype),
        "PRECISION": launcher.input_precision(G.dtype),
    }


def _correct(Y: Tensor, Z: Tensor, C: Tensor, operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Put `(UᵀU)⁻¹` and `(VᵀV)⁻¹` where the plain formulas assume the identity."""
    U, V = operands.bases()
    right = inverse_gram(V)
    if operands.sides:
        Y = Y @ right
    if operands.core:
        left = inverse_gram(U)
        C = left[:, None] @ C @ right[:, None]
        if operands.sides == 2:
            Z = Z @ left
    return Y, Z, C


def inverse_gram(B: Tensor) -> Tensor:
    """`(BᵀB)⁻¹` in float32; for a rounded orthonormal basis it is close to the identity.

    No look at whether it exists: that would wait for the device, which a captured graph cannot.
    """
    wide = B.float()
    inverse: Tensor = torch.linalg.inv_ex(wide.mT @ wide).inverse
    return inverse
