"""The cost model: which products a projection is made of, what they cost, and which are cheapest.

Pure arithmetic on shapes; no tensor is touched. `plan` answers a user's question in advance, and
the implementations take their order of contraction from the same function (`arrange`), so that
what is planned is what runs.

Notation: `G` is `m x n`, the removed subspaces have ranks `r` (left) and `s` (right). A side can be
given by its *complement*: columns that span what is kept instead of what is removed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from sculpt_kernels import checks
from sculpt_kernels.plan.devices import Device, device_model

SMALL_RANK = 128  # above it the two-launch kernel spills registers


@dataclass(frozen=True)
class Product:
    """One matrix product `rows x depth` by `depth x columns`."""

    text: str
    rows: int
    columns: int
    depth: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.columns * self.depth


@dataclass(frozen=True)
class Arrangement:
    """Products of one projection, in order.

    Attributes:
        products: what is computed; `transposed` ones are written for `Gᵀ`, with `U` and `V`
            swapped.
        transposed: work on `Gᵀ` because that is cheaper.
        passes: reads and writes of the whole matrix.
    """

    products: tuple[Product, ...]
    transposed: bool
    passes: int

    @property
    def flops(self) -> int:
        return sum(product.flops for product in self.products)


@dataclass(frozen=True)
class Plan:
    """How one projection is best computed, and what it costs.

    Attributes:
        shape: `(m, n)`; ranks: `(r, s)`, the ranks that are *removed*; form: the projection.
        complement: `"none"`, `"left"`, `"right"` or `"both"`: sides to be given by a basis of
            what is kept; pass it on as `project_(..., complement=plan.complement)`.
        algorithm: `"identity"`, `"direct"`, `"complement-left"`, `"complement-right"` or
            `"complement-both"`.
        kernel: `"two-launch"` (Triton, ranks up to 128), `"library"` (GEMMs of the device's
            library, the last one updating `G` in place) or `"panels"` (CPU, row panels).
        products: the products in order.
        transposed: they are applied to `Gᵀ`: the other side is contracted first.
        flops: floating-point operations; bytes: memory traffic, the bases read twice.
        compute_seconds, memory_seconds: bounds from the device's sustained rates.
        direct_seconds: the bound of the same projection without a complement.
    """

    shape: tuple[int, int]
    ranks: tuple[int, int]
    form: str
    dtype: torch.dtype
    device: str
    complement: str
    algorithm: str
    kernel: str
    products: tuple[Product, ...]
    transposed: bool
    flops: int
    bytes: int
    compute_seconds: float
    memory_seconds: float
    direct_seconds: float

    @property
    def seconds(self) -> float:
        """Lower bound of the time: the larger of arithmetic and memory traffic."""
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def bound(self) -> str:
        """`"compute"` or `"memory"`, whichever takes longer."""
        return "compute" if self.compute_seconds > self.memory_seconds else "memory"

    def __str__(self) -> str:
        m, n = self.shape
        r, s = self.ranks
        ranks = {"left": f"rank {r}", "right": f"rank {s}"}.get(self.form, f"ranks {r} and {s}")
        head = (
            f"The {self.form} projection of a {m} x {n} {checks.dtype_name(self.dtype)} matrix "
            f"with {ranks} removed on {self.device}"
        )
        if not self.products:
            return f"{head} is the identity: nothing to compute."
        order = "the right side" if self.products[0].text.startswith("G V") else "the left side"
        if self.transposed:
            order = "the left side" if order == "the right side" else "the right side"
        how = {
            "two-launch": "two fused launches",
            "library": f"{len(self.products)} library products, the last one in place",
            "panels": f"{len(self.products)} products in row panels",
        }[self.kernel]
        gain = ""
        if self.complement != "none":
            side = "both sides" if self.complement == "both" else f"the {self.complement} side"
            gain = (
                f", with the complement as basis of {side} "
                f"({self.direct_seconds / self.seconds:.2f}x faster than without)"
            )
        return (
            f"{head} takes {how}, contracting {order} first{gain}: {_si(self.flops, 'FLOP')}, "
            f"{_si(self.bytes, 'B')}, at least {_si(self.seconds, 's')}, {self.bound}-bound."
        )


def plan(
    shape: tuple[int, ...],
    rank: int | tuple[int, int],
    *,
    form: str = "core",
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device | None = None,
    complement: str | None = None,
) -> Plan:
    """Choose how to project a matrix of `shape` and say what it costs.

    Args:
        shape: `(m, n)`; leading batch dimensions are ignored, the plan is for one matrix.
        rank: rank that is removed, `r` on both sides or `(r, s)`; a side that the form does not
            use is ignored.
        form: `"core"`, `"strict"`, `"left"` or `"right"`.
        dtype: of `G` and the bases.
        device: `"H100"`, `"H200"`, `"A100"`, `"cpu"`, or a torch device; default: the CUDA device
            of this machine, else the CPU.
        complement: `None` to let the plan choose which sides are best given by their complement;
            or one of `"none"`, `"left"`, `"right"`, `"both"` to cost exactly that.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    m, n = _check_shape(shape)
    r, s = _check_ranks(rank, form, m, n)
    checks.floating("dtype", dtype)
    model = device_model(device)
    allowed = checks.COMPLEMENTS[form]
    if complement is not None:
        checks.one_of("complement", complement, allowed)
    direct = _cost(m, n, r, s, form, "none", dtype, model)
    if complement == "none" or direct.algorithm == "identity":
        return direct
    if complement is not None:
        return _cost(m, n, r, s, form, complement, dtype, model, direct.seconds)
    others = (_cost(m, n, r, s, form, sides, dtype, model, direct.seconds) for sides in allowed[1:])
    return min((direct, *others), key=lambda option: (option.seconds, option.flops))


@lru_cache(maxsize=4096)
def arrange(form: str, complement: str, m: int, n: int, a: int, b: int, fused: bool) -> Arrangement:
    """The cheapest arrangement for bases that were *given* with `a` and `b` columns.

    `fused` asks for one last product that updates `G`, as a library needs it to round once;
    otherwise the last steps are local to a row panel and save the small products.
    """
    if form == "right":
        orientations: tuple[bool, ...] = (False,)
    elif form == "left" or complement == "right":
        orientations = (True,)
    elif complement == "left":
        orientations = (False,)
    else:
        orientations = (False, True)
    options = [_arrangement(form, complement, m, n, a, b, fused, turn) for turn in orientations]
    # Equal arithmetic: the one that keeps the smaller intermediate result.
    return min(options, key=lambda o: (o.flops, o.products[0].rows * o.products[0].columns))


def _arrangement(
    form: str, complement: str, m: int, n: int, a: int, b: int, fused: bool, transposed: bool
) -> Arrangement:
    if transposed:
        m, n, a, b = n, m, b, a
    kind = kind_of(form, complement)
    right = Product("G V", m, b, n)
    left = Product("Uᵀ G", a, n, m)
    core = Product("Uᵀ (G V)", a, b, m)
    spread = Product("U C", m, b, a)
    last = Product("Y Vᵀ", m, n, b)
    if kind == "side":
        products = [right, last]
        passes = 3 if fused and complement == "none" else 2
    elif kind == "core":
        products = [right, core, spread, last]
        passes = 2 if fused and form == "strict" else 3
    elif kind == "kept":
        # All of it happens on the few kept rows Uᵀ G.
        products = [
            left,
            Product("X V", a, b, n),
            Product("D Vᵀ", a, n, b),
            Product("U Z", m, n, a),
        ]
        passes = 2
    elif fused:
        products = [right, left, core, spread, Product("[U Y] [X; Vᵀ]", m, n, a + b)]
        passes = 4 if form == "strict" else 3
    else:
        products = [left, Product("U X", m, n, a), right, last]
        passes = 3
    return Arrangement(tuple(products), transposed, passes)


def kind_of(form: str, complement: str) -> str:
    """Which of four computations a form is.

    `"side"` touches one side; `"core"` needs only `UᵀGV`; `"sides"` removes or keeps both sides;
    `"kept"` works on the rows `UᵀG` that a complement keeps.
    """
    if form in ("left", "right"):
        return "side"
    if form == "core":
        return "sides" if complement == "both" else "core"
    return {"none": "sides", "both": "core"}.get(complement, "kept")


def simplified(form: str, r: int, s: int) -> str | None:
    """The form that is left to compute when a removed rank is zero; `None` for the identity."""
    if form == "strict" and r == 0:
        form = "right"
    elif form == "strict" and s == 0:
        form = "left"
    empty = (form != "right" and r == 0) or (form != "left" and s == 0)
    return None if empty else form


def _cost(
    m: int,
    n: int,
    r: int,
    s: int,
    form: str,
    complement: str,
    dtype: torch.dtype,
    model: Device,
    direct_seconds: float | None = None,
) -> Plan:
    a = m - r if complement in ("left", "both") else r
    b = n - s if complement in ("right", "both") else s
    run = simplified(form, r, s) if complement == "none" else form
    if run is None or m * n == 0:
        found = Arrangement((), False, 0)
    else:
        found = arrange(run, complement, m, n, a, b, model.is_gpu)
    used = (0 if form == "right" else m * a) + (0 if form == "left" else n * b)
    traffic = (found.passes * m * n + 2 * used) * dtype.itemsize if found.products else 0
    compute, memory = found.flops / model.flops(dtype), traffic / model.bandwidth
    small = max(a, b) <= SMALL_RANK and complement == "none" and dtype != torch.float64
    algorithm = "direct" if complement == "none" else f"complement-{complement}"
    return Plan(
        shape=(m, n),
        ranks=(r, s),
        form=form,
        dtype=dtype,
        device=model.name,
        complement=complement,
        algorithm=algorithm if found.products else "identity",
        kernel=("two-launch" if small else "library") if model.is_gpu else "panels",
        products=found.products,
        transposed=found.transposed,
        flops=found.flops,
        bytes=traffic,
        compute_seconds=compute,
        memory_seconds=memory,
        direct_seconds=max(compute, memory) if direct_seconds is None else direct_seconds,
    )


def _check_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    sizes = tuple(shape)
    if len(sizes) < 2 or not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"shape must be (..., m, n) of sizes >= 0; got {sizes}")
    return sizes[-2], sizes[-1]


def _check_ranks(rank: int | tuple[int, int], form: str, m: int, n: int) -> tuple[int, int]:
    checks.one_of("form", form, checks.FORMS)
    r, s = rank if isinstance(rank, tuple) and len(rank) == 2 else (rank, rank)
    if form != "right":
        checks.rank_in("rank", r, m, "m")
    if form != "left":
        checks.rank_in("rank", s, n, "n")
    return (0 if form == "right" else r), (0 if form == "left" else s)


def _si(value: float, unit: str) -> str:
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, "")):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    for scale, prefix in ((1e-3, "m"), (1e-6, "µ"), (1e-9, "n")):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"0 {unit}"
