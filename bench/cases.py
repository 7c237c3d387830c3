"""What is measured: operations, shapes, and the lines of torch that they must beat.

Every case offers variants of one operation on the same inputs: `naive` is the formula as one would
write it down, `chain` the best lines of torch that we know, `compiled` the reference under
`torch.compile`, the others are ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sculpt_kernels import (
    backends,
    compress,
    expand_add_,
    orthonormalize,
    plan,
    project_,
    project_adamw_,
    reference,
)

# Weight matrices (out x in) of one layer.
MODELS = {
    "SmolLM2-135M": [(576, 576), (192, 576), (1536, 576), (576, 1536)],
    "SmolLM2-1.7B": [(2048, 2048), (8192, 2048), (2048, 8192)],
    "LLaMA-2-7B": [(4096, 4096), (11008, 4096), (4096, 11008)],
}
RATIOS = {"1/32": 1 / 32, "1/8": 1 / 8, "1/4": 1 / 4, "1/2": 1 / 2, "3/4": 3 / 4}
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "step": 10}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

FORMS = ("core", "strict", "left", "right")
OPERATIONS = (*FORMS, "compress", "expand_add", "adamw")

Variants = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """One operation on one shape at one rank."""

    operation: str  # "project", "compress", "expand_add", "adamw"
    form: str
    shape: tuple[int, int]
    ratio: str
    dtype: str
    model: str = ""

    @property
    def rank(self) -> int:
        return max(1, round(RATIOS[self.ratio] * min(self.shape)))

    @property
    def name(self) -> str:
        m, n = self.shape
        what = self.operation if self.operation != "project" else self.form
        return f"{what} {m}x{n} {self.ratio} {self.dtype}"


@dataclass
class Inputs:
    """Tensors of one case; `fresh` makes another set with other values."""

    case: Case
    device: torch.device
    seed: int
    G: Tensor = field(init=False)
    U: Tensor = field(init=False)
    V: Tensor = field(init=False)

    def __post_init__(self) -> None:
        m, n = self.case.shape
        r = self.case.rank
        dtype = DTYPES[self.case.dtype]
        generator = torch.Generator(self.device).manual_seed(self.seed)

        def gaussian(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=self.device)

        self.G = gaussian(m, n).to(dtype)
        self.U = orthonormalize(gaussian(m, r)).to(dtype)
        self.V = orthonormalize(gaussian(n, r)).to(dtype)
        if self.case.operation == "expand_add":
            self.C = gaussian(r, r) * 1e-3
        if self.case.operation == "adamw":
            self.W = gaussian(m, n)
            self.exp_avg = gaussian(m, n) * 1e-2
            self.exp_avg_sq = gaussian(m, n).square_() * 1e-4
            # A 16-bit copy of float32 weights is part of training in 16 bits.
            self.low = self.W.to(dtype) if dtype != torch.float32 else None

    def again(self, seed: int) -> Inputs:
        """Another set at other addresses: other values, the same bases."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(other, name, value.clone())
        other.G.normal_(generator=torch.Generator(self.device).manual_seed(seed))
        return other

    def complements(self, sides: str) -> tuple[Tensor, Tensor]:
        """Bases of the orthogonal complements on the given sides."""

        def other(B: Tensor, name: str) -> Tensor:
            if sides not in (name, "both"):
                return B
            full = torch.linalg.qr(B.float(), mode="complete").Q
            return full[:, B.shape[1] :].to(B.dtype).contiguous()

        return other(self.U, "left"), other(self.V, "right")


def cases(
    models: list[str],
    operations: list[str],
    dtypes: list[str],
    ratios: list[str],
) -> Iterator[Case]:
    """All combinations."""
    for model in models:
        for shape in MODELS[model]:
            for operation in operations:
                kind, form = ("project", operation) if operation in FORMS else (operation, "core")
                for dtype in dtypes:
                    for ratio in ratios:
                        yield Case(kind, form, shape, ratio, dtype, model)


def variants(data: Inputs, *, compiled: bool = False) -> Variants:
    """The variants of a case, ours last; each call is one operation."""
    make = {
        "project": _project,
        "compress": _compress,
        "expand_add": _expand_add,
        "adamw": _adamw,
    }[data.case.operation]
    return make(data, compiled)


def _project(data: Inputs, compiled: bool) -> Variants:
    G, form = data.G, data.case.form
    U = None if form == "right" else data.U
    V = None if form == "left" else data.V

    def chain() -> None:
        if form == "core":
            G.addmm_(U @ (U.T @ (G @ V)), V.T, alpha=-1)
        if form in ("strict", "left"):
            G.addmm_(U, U.T @ G, alpha=-1)
        if form in ("strict", "right"):
            G.addmm_(G @ V, V.T, alpha=-1)

    found: Variants = {"naive": lambda: reference.project(G, U, V, form), "chain": chain}
    if compiled:
        function = torch.compile(reference.project)
        found["compiled"] = lambda: function(G, U, V, form)
    found["ours"] = lambda: project_(G, U, V, form=form)
    best = plan(data.case.shape, data.case.rank, form=form, dtype=G.dtype, device=data.device)
    if best.complement != "none":
        A, B = data.complements(best.complement)
        kept = (None if form == "right" else A, None if form == "left" else B)
        found["ours, complement"] = lambda: project_(
            G, *kept, form=form, complement=best.complement
        )
    return found


def _compress(data: Inputs, compiled: bool) -> Variants:
    G, U, V = data.G, data.U, data.V
    found: Variants = {
        "naive": lambda: U.T @ G @ V,
        "chain": lambda: U.T @ (G @ V) if G.shape[0] <= G.shape[1] else (U.T @ G) @ V,
    }
    if compiled:
        function = torch.compile(reference.compress)
        found["compiled"] = lambda: function(G, U, V)
    found["ours"] = lambda: compress(G, U, V)
    return found


def _expand_add(data: Inputs, compiled: bool) -> Variants:
    W, C, U, V = data.G, data.C.to(data.G.dtype), data.U, data.V

    def naive() -> None:
        W.add_(0.5 * (U @ C @ V.T))

    def chain() -> None:
        if W.shape[0] <= W.shape[1]:
            W.addmm_(U @ C, V.T, alpha=0.5)
        else:
            W.addmm_(U, C @ V.T, alpha=0.5)

    found: Variants = {"naive": naive, "chain": chain}
    if compiled:
        function = torch.compile(reference.expand_add)
        found["compiled"] = lambda: function(W, C, U, V, 0.5)
    found["ours"] = lambda: expand_add_(W, data.C, U, V, alpha=0.5)
    if W.dtype != torch.float32:
        stochastic = {"alpha": 0.5, "rounding": "stochastic", "seed": 1}
        found["ours, stochastic"] = lambda: expand_add_(W, data.C, U, V, **stochastic)
        if not W.is_cuda and backends()["native"] == "available":
            found["ours, stochastic, torch"] = lambda: expand_add_(
                W, data.C, U, V, backend="torch", **stochastic
            )
    return found


def _adamw(data: Inputs, compiled: bool) -> Variants:
    """Projected AdamW steps; the baselines project the gradient, as is done without us."""
    G, U, V = data.G, data.U, data.V
    state = (data.W, G, data.exp_avg, data.exp_avg_sq)
    parameter = torch.nn.Parameter(data.W.clone())
    options = {key: value for key, value in ADAMW.items() if key != "step"}
    # On a GPU such that it can be captured into a graph, as ours can.
    fused = torch.optim.AdamW([parameter], fused=True, capturable=G.is_cuda, **options)
    wide = G if G.dtype == torch.float32 else torch.empty_like(data.W)

    def stepped() -> None:
        parameter.grad = wide if wide is G else wide.copy_(G)
        fused.step()
        if data.low is not None:
            data.low.copy_(parameter.detach())

    def naive() -> None:
        G.copy_(reference.project(G, U, V, "core"))
        stepped()

    def chain() -> None:
        G.addmm_(U @ (U.T @ (G @ V)), V.T, alpha=-1)
        stepped()

    found: Variants = {"AdamW alone": stepped, "naive": naive, "chain": chain}
    if compiled:
        function = torch.compile(reference.project_adamw)
        found["compiled"] = lambda: function(*state, U, V, project="gradient", **ADAMW)
    for project in ("gradient", "update"):
        found[f"ours, {project}"] = lambda project=project: project_adamw_(
            *state, U, V, project=project, copy=data.low, **ADAMW
        )
    return found


def floor(case: Case, device: str, flops: float, bandwidth: float) -> float:
    """Least seconds by measured rates: the arithmetic of the best plan, or one pass of traffic."""
    m, n = case.shape
    size = DTYPES[case.dtype].itemsize
    best = plan(case.shape, case.rank, form=case.form, dtype=DTYPES[case.dtype], device=device)
    work, traffic = best.flops, best.bytes
    if case.operation == "compress":
        work, traffic = best.flops / 2, (m * n + (m + n) * case.rank) * size
    elif case.operation == "expand_add":
        work, traffic = best.flops / 2, (2 * m * n + (m + n) * case.rank) * size
    elif case.operation == "adamw":
        # Projection reads G twice; weights and moments are read and written in float32.
        traffic = (2 * size + 24 + (size if size < 4 else 0)) * m * n
    return max(work / flops, traffic / bandwidth)
