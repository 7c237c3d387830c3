"""Where the public functions meet the native library.

The `*_reason` functions say why it cannot take a call, or, for `auto`, why torch is faster; `None`
if neither holds. The others trust arguments that the public functions have validated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sculpt_kernels import native
from sculpt_kernels.panels import matrices
from sculpt_kernels.plan import arrange

# Rows of a panel; 0 leaves them to the library. Results do not depend on it.
PANEL_ROWS = 0


def expand_add_reason(
    auto: bool,
    W: Tensor,
    C: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    base: Tensor | None,
    rounding: str,
) -> str | None:
    if U is None or V is None:
        return "the native kernels need both bases"
    if auto and rounding == "nearest" and W.dtype == torch.float32:
        return "torch adds float32 products in place, which is faster"
    return _unsupported(W, C, U, V, base) or (_slow(W, base) if auto else None)


def adamw_reason(
    auto: bool, complement: str, state: Sequence[Tensor | None], U: Tensor | None, V: Tensor | None
) -> str | None:
    if complement != "none":
        return f"the native kernels take no complement={complement!r}"
    return _unsupported(*state, U, V) or (_slow(*state) if auto else None)


def expand_add_(
    W: Tensor,
    C: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    alpha: float | Tensor,
    seed: int | Tensor | None,
    base: Tensor | None,
) -> None:
    """As the public function, the small product `alpha C` formed before."""
    library = native.library()
    C = (C.float() * alpha).contiguous()
    left, right = (None if B is None else _floats(B) for B in (U, V))
    for index, (w, c, u, v, b) in enumerate(matrices(W, C, left, right, base)):
        assert w is not None
        assert c is not None
        products = _products(w, u, v, "core")
        job = native.ExpandAdd(
            products, native.describe(w), native.describe(w if b is None else b), c.data_ptr(),
            _rounding(seed, index * W.shape[-2]),
        )  # fmt: skip
        memory = library.workspace(job.products)
        library.expand_add(job)
        del memory  # held until here


def project_adamw_(
    W: Tensor,
    G: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    U: Tensor | None,
    V: Tensor | None,
    copy: Tensor | None,
    *,
    form: str,
    project: str,
    lr: float | Tensor,
    betas: tuple[float | Tensor, float | Tensor],
    eps: float | Tensor,
    weight_decay: float | Tensor,
    step: int | Tensor,
    seed: int | Tensor | None,
) -> None:
    """As the public function."""
    library = native.library()
    beta1, beta2, count = float(betas[0]), float(betas[1]), int(step)
    scalars = {
        "lr": float(lr),
        "rest1": 1 - beta1,
        "rest2": 1 - beta2,
        "eps": float(eps),
        "weight_decay": float(weight_decay),
        "lift": 1 / (1 - beta1**count),
        "root": (1 - beta2**count) ** -0.5,
    }
    left, right = (None if B is None else _floats(B) for B in (U, V))
    for index, (w, g, m, v, c, a, b) in enumerate(
        matrices(W, G, exp_avg, exp_avg_sq, copy, left, right)
    ):
        assert w is not None
        state = {"W": w, "G": g, "exp_avg": m, "exp_avg_sq": v, "copy": c}
        job = native.AdamW(
            products=_products(w, a, b, form),
            **{name: native.describe(X) for name, X in state.items()},
            **scalars,
            gradient=int(project == "gradient"),
            rounding=_rounding(seed, index * W.shape[-2]),
        )
        memory = library.workspace(job.products)
        library.project_adamw(job)
        del memory  # held until here


def _unsupported(*tensors: Tensor | None) -> str | None:
    for X in tensors:
        if X is None:
            continue
        if not X.is_cpu:
            return f"the native kernels work on CPU tensors; these are on {X.device}"
        if X.dtype not in native.DTYPES:
            return f"the native kernels have no {str(X.dtype).removeprefix('torch.')}"
        if any(size >= 2**31 for size in X.shape[-2:]):
            return "the native kernels take matrices of less than 2**31 rows and columns"
    return native.missing()


def _slow(*tensors: Tensor | None) -> str | None:
    if any(X is not None and X.stride(-1) != 1 for X in tensors):
        return "the rows are not contiguous"
    return None


def _floats(B: Tensor) -> Tensor:
    """A basis as a BLAS takes it: float32, rows or columns contiguous and apart."""
    B = B.float()
    rows, columns = B.shape[-2:]
    for across, along, extent in ((-2, -1, columns), (-1, -2, rows)):
        apart = B.shape[across] == 1 or extent <= B.stride(across) < 2**31
        if B.stride(along) == 1 and apart and B.data_ptr() % 4 == 0:
            return B
    return B.clone(memory_format=torch.contiguous_format)


def _products(W: Tensor, U: Tensor | None, V: Tensor | None, form: str) -> native.Products:
    m, n = W.shape
    r = 0 if U is None else U.shape[1]
    s = 0 if V is None else V.shape[1]
    turned = (
        form == "core" and bool(r and s) and arrange(form, "none", m, n, r, s, False).transposed
    )
    library = native.library()
    return native.Products(
        m, n, r, s, native.describe(U), native.describe(V), library.sgemm,
        library.row_gemm(torch.float32), library.row_gemm(torch.bfloat16),
        form=native.FORMS[form], left_first=int(turned), threads=torch.get_num_threads(),
        panel_rows=PANEL_ROWS,
    )  # fmt: skip


def _rounding(seed: int | Tensor | None, row0: int) -> native.Rounding:
    key = 0 if seed is None else int(seed) % 2**64
    return native.Rounding(row0, key, int(seed is not None))
