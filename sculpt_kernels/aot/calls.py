"""The operations that a pack holds, for one shape, rank and dtype, on tensors without memory.

Changing scalars are there twice: as numbers, and as 0-d tensors on the device. The second kind is
what C callers get, so that a captured graph sees new values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sculpt_kernels.kernels import adamw, compress, expand_add, host, project, sketch, update
from sculpt_kernels.kernels.config import SMALL_RANK

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MANY = 8


@dataclass(frozen=True)
class Call:
    """An operation and its launches.

    `formula` and `tensors`, in the order in which C callers pass them, are empty where C has no
    such function. `alone` says that nothing but the launches is needed: torch does no work of its
    own before, between or after them.
    """

    name: str
    formula: str
    tensors: dict[str, Tensor]
    launches: list[host.Launch]
    alone: bool


class Foreign(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notices work that torch does itself: all but views and memory that is not filled."""

    _FREE = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided",
             "aten::new_empty_strided")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func.is_view and func.name().partition(".")[0] not in self._FREE:
            self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


def calls(m: int, n: int, rank: int, dtype: str, arch: int) -> list[Call]:
    """Every operation on an `m x n` matrix at `rank`, as a device of `arch` launches it."""
    previous = host.target_capability
    host.target_capability = divmod(arch, 10)
    try:
        return [
            _recorded(f"{name}_{m}x{n}_r{rank}_{dtype}", formula, tensors, run)
            for name, formula, tensors, run in _operations(m, n, rank, DTYPES[dtype])
        ]
    finally:
        host.target_capability = previous


def _recorded(name: str, formula: str, tensors: dict[str, Tensor], run: Callable[[], Any]) -> Call:
    with host.record() as launches, Foreign() as foreign:
        run()
    return Call(name, formula, tensors, launches, alone=not foreign.seen)


def of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


Operation = tuple[str, str, dict[str, Tensor], Callable[[], Any]]


def _operations(m: int, n: int, r: int, dtype: torch.dtype) -> Iterator[Operation]:
    if r <= SMALL_RANK:
        yield from _projections(m, n, r, dtype)
        yield "sketch", "", {}, lambda: sketch.sketch(of(n, r), 1, 0)
    roundings = ("nearest",) if dtype == torch.float32 else ("nearest", "stochastic")
    for rounding in roundings:
        for scalars in ("numbers", "device"):
            yield from _updates(m, n, r, dtype, rounding, scalars == "device")
            yield from _steps(m, n, r, dtype, rounding, scalars == "device")


def _projections(m: int, n: int, r: int, dtype: torch.dtype) -> Iterator[Operation]:
    G, U, V = of(m, n, dtype=dtype), of(m, r, dtype=dtype), of(n, r, dtype=dtype)
    formulas = {
        "core": "G <- G - U (U' G V) V'",
        "strict": "G <- (1 - U U') G (1 - V V')",
        "left": "G <- (1 - U U') G",
        "right": "G <- G (1 - V V')",
    }
    for form, formula in formulas.items():
        left, right = None if form == "right" else U, None if form == "left" else V
        tensors = {name: X for name, X in {"G": G, "U": left, "V": right}.items() if X is not None}

        def one(u: Tensor | None = left, v: Tensor | None = right, form: str = form) -> None:
            project.project_(G, u, v, form)

        def many(u: Tensor | None = left, v: Tensor | None = right, form: str = form) -> None:
            project.project_many_([G] * MANY, [u] * MANY, [v] * MANY, form)

        yield f"project_{form}", formula, tensors, one
        yield f"project_many_{form}", "", {}, many
        if dtype != torch.float32 and form in ("core", "strict"):

            def exact(form: str = form) -> None:
                project.project_(G, U, V, form, precision="exact")

            yield f"project_{form}_exact", "", {}, exact
    yield "compress", "", {}, lambda: compress.compress(G, U, V, of(r, r))


def _updates(
    m: int, n: int, r: int, dtype: torch.dtype, rounding: str, device: bool
) -> Iterator[Operation]:
    X, A, B = of(m, n, dtype=dtype), of(m, r, dtype=dtype), of(n, r, dtype=dtype)
    C = of(r, r)
    alpha: Any = of() if device else 0.5
    options: dict[str, Any] = {"alpha": alpha, "rounding": rounding}
    if rounding == "stochastic":
        options["seed"] = of(dtype=torch.int64) if device else 1
    name = f"{rounding}_{'device' if device else 'numbers'}"

    def run() -> None:
        update.update_(X, A, B, **options)

    if device:
        scalars = {key: value for key, value in options.items() if isinstance(value, Tensor)}
        formula = f"X <- X + alpha A B', rounding {rounding}"
        yield f"update_{rounding}", formula, {"X": X, "A": A, "B": B} | scalars, run
    else:
        yield f"update_{name}", "", {}, run
    yield f"expand_add_{name}", "", {}, lambda: expand_add.expand_add_(X, C, A, B, **options)
    seeds = of(MANY, dtype=torch.int64) if rounding == "stochastic" else None
    yield (
        f"expand_add_many_{name}",
        "",
        {},
        lambda: expand_add.expand_add_many_(
            [X] * MANY, [C] * MANY, [A] * MANY, [B] * MANY, alpha, rounding, seeds
        ),
    )


def _steps(
    m: int, n: int, r: int, dtype: torch.dtype, rounding: str, device: bool
) -> Iterator[Operation]:
    W, exp_avg, exp_avg_sq = of(m, n), of(m, n), of(m, n)
    G, D, copy = (of(m, n, dtype=dtype) for _ in range(3))
    U, V = of(m, r, dtype=dtype), of(n, r, dtype=dtype)
    values = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
    numbers: dict[str, Any] = {name: of() if device else x for name, x in values.items()}
    numbers["step"] = of(dtype=torch.int64) if device else 1
    seed: Any = None
    if rounding == "stochastic":
        seed = of(dtype=torch.int64) if device else 1
    chosen: dict[str, Any] = {"rounding": rounding, "seed": seed}
    if dtype != torch.float32:
        chosen["copy"] = copy
    for form in ("core", "strict"):
        for kind in ("update", "gradient"):
            name = f"project_adamw_{form}_{kind}_{rounding}_{'device' if device else 'numbers'}"

            def fused(form: str = form, kind: str = kind) -> None:
                adamw.project_adamw_(
                    W, G, exp_avg, exp_avg_sq, U, V, form=form, project=kind, lr=numbers["lr"],
                    betas=(numbers["beta1"], numbers["beta2"]), eps=numbers["eps"],
                    weight_decay=numbers["weight_decay"], step=numbers["step"], **chosen,
                )  # fmt: skip

            yield name, "", {}, fused
    if not device:
        return
    rest = {"rest1": numbers.pop("beta1"), "rest2": numbers.pop("beta2")}
    lr = numbers.pop("lr")
    scalars = rest | numbers
    state = {"W": W, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    if rounding == "nearest":
        yield (
            "adamw_direction",
            "moments take in G; D <- m / (sqrt(v) + eps) + weight_decay W, bias-corrected",
            {"D": D, "G": G, **state, **scalars},
            lambda: adamw.direction_(D, W, G, exp_avg, exp_avg_sq, scalars),
        )
    yield (
        f"adamw_step_{rounding}",
        f"W <- W - lr (D - A B'), copy <- W, rounding {rounding}",
        {"D": D, "A": U, "B": V, **state, "lr": lr, **scalars,
         **{name: X for name, X in chosen.items() if isinstance(X, Tensor)}},
        lambda: adamw.step_(
            W, D, exp_avg, exp_avg_sq, U, V, gradient=False, lr=lr, scalars=scalars, **chosen
        ),
    )  # fmt: skip
