"""Subspaces of the matrices of LLaMA-2-7B: the library's decompositions, each method, a model.

What `sculpt_kernels.plan_split` assumes of the decompositions is settled here: predicted and
measured seconds stand side by side.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu_parts.run import Run
from bench.subspaces import planted, spectra
from sculpt_kernels import plan_split, split

# Shape of the weights and how many of them the model has.
MODEL = {(4096, 4096): 128, (4096, 11008): 96}
TINY_MODEL = {(96, 96): 2, (96, 160): 2}
TRAINABLE = 0.25

Call = Callable[[], Any]


def part_subspaces(run: Run) -> None:
    """What takes fractions of a second, and a whole model."""
    model = _model(run)
    for shape in model:
        case = Case(run, shape)
        for name, call in _ours(case).items():
            run.attempt(case.name(name), 4.0, _one, case, name, call, 3)
    run.attempt("a whole model", 15.0, _whole_model, run, model)


def part_svd(run: Run) -> None:
    """The library's singular value decompositions, each once: they may take many seconds."""
    for shape in _model(run):
        case = Case(run, shape)
        for name, call in _svds(case).items():
            run.attempt(case.name(name), 8.0, _one, case, name, call, 1)


def _model(run: Run) -> dict[tuple[int, int], int]:
    return TINY_MODEL if run.options.tiny else MODEL


class Case:
    """A matrix with planted singular values, and the rank to preserve."""

    def __init__(self, run: Run, shape: tuple[int, int]) -> None:
        torch.linalg.svd(torch.randn(64, 64, device=run.device))  # loads the solvers' library
        values = spectra(min(shape))["spikes"]
        self.run, self.shape = run, shape
        self.W = planted(*shape, values, run.device.type)
        self.rank = min(shape) - int(TRAINABLE * min(shape))
        self.best = float(values[: self.rank].square().sum() / values.square().sum())

    def name(self, method: str) -> str:
        return f"subspaces {self.matrix} {method}"

    @property
    def matrix(self) -> str:
        return f"{self.shape[0]}x{self.shape[1]}"


def _ours(case: Case) -> dict[str, Call]:
    """By name, and what decompositions of the Gram matrix take by themselves."""
    W = case.W

    def ours(method: str, dtype: torch.dtype, part: str = "low", h: int = case.rank) -> Call:
        return lambda: split(W.to(dtype), rank=h, part=part, method=method)

    def eigh(dtype: torch.dtype) -> Call:
        return lambda: torch.linalg.eigh(W.to(dtype) @ W.to(dtype).T)

    few = min(W.shape) // 16
    return {
        "spectral": ours("spectral", torch.float32),
        "gram float32": ours("gram", torch.float32),
        "gram float64": ours("gram", torch.float64),
        "range k/16": ours("range", torch.float32, "high", few),
        "eigh float32": eigh(torch.float32),
        "eigh float64": eigh(torch.float64),
        "svd_lowrank k/16": lambda: torch.svd_lowrank(W, q=few, niter=2),
    }


def _svds(case: Case) -> dict[str, Call]:
    """The library's choice first, then its drivers by name."""
    W = case.W
    calls: dict[str, Call] = {"svd": lambda: torch.linalg.svd(W, full_matrices=False)}
    if W.is_cuda:
        for driver in ("gesvdj", "gesvda", "gesvd"):
            calls[f"svd {driver}"] = lambda d=driver: torch.linalg.svd(W, False, driver=d)
    return calls


def _one(case: Case, name: str, call: Call, times: int) -> None:
    # The first call allocates and loads.
    spent = [_seconds(case.run, call) for _ in range(times)]
    row: dict[str, Any] = {"matrix": case.matrix, "method": name, "seconds": min(spent)}
    method, *how = name.split()
    if method in ("spectral", "gram", "svd") and how in ([], ["float32"], ["float64"]):
        dtype = torch.float32 if how == ["float32"] or method == "svd" else torch.float64
        row["predicted"] = _predicted(case.run, case.shape, case.rank, dtype, method)
    if method in ("spectral", "gram", "range"):
        found = call()
        row |= {"used": found.method, "energy": found.energy}
        if found.rank == case.rank:
            row["of_optimum"] = found.energy / case.best
    case.run.results["subspaces"].append(row)
    print(_line(row), flush=True)


def _whole_model(run: Run, model: dict[tuple[int, int], int]) -> None:
    """All matrices one by one, as training asks for them: bfloat16 weights, bases exact in float64.

    Random bulks with spikes, each with its own seed. Out of time, the rest is taken to be like what
    was measured, and the row says how many that were.
    """
    total, done, predicted, lost = 0.0, 0, 0.0, 0.0
    used: dict[str, int] = {}
    # Five seconds are for the exact spectra at the end.
    left = run.left - 5
    for part, (shape, count) in enumerate(model.items()):
        rank = min(shape) - int(TRAINABLE * min(shape))
        predicted += count * _predicted(run, shape, rank, torch.float64, None)
        spent: list[float] = []
        share = left / (len(model) - part)
        for seed in range(count):
            if spent and sum(spent) * (1 + 2 / len(spent)) > share:
                break
            W = _weight(run, shape, seed)
            seconds = _seconds(run, lambda: used_by(used, split(W.double(), rank=rank)))  # noqa: B023
            spent.append(seconds)
        left -= sum(spent)
        total += count * sum(spent) / len(spent)
        done += len(spent)
        squares = torch.linalg.eigvalsh(W.double() @ W.double().T).flip(0)
        low = split(W.double(), rank=rank)
        outside = float((low.U.T @ W.double()).square().sum() - squares[rank:].sum())
        lost = max(lost, outside / float(squares[:rank].sum()))
    run.results["subspaces"].append(
        {
            "matrix": f"LLaMA-2-7B, {sum(model.values())} matrices",
            "method": "auto float64",
            "seconds": total,
            "predicted": predicted,
            "measured_matrices": done,
            "used": ", ".join(f"{name} {count}" for name, count in used.items()),
            "of_optimum": 1 - lost,
        }
    )
    print(_line(run.results["subspaces"][-1]), flush=True)


def times_svd(rows: list[dict[str, Any]]) -> float | None:
    """Seconds of the library's decomposition of the whole model over those of ours."""
    slow = {row["matrix"]: row["seconds"] for row in rows if row["method"] == "svd"}
    whole = [row for row in rows if row["method"] == "auto float64"]
    for model in (MODEL, TINY_MODEL):
        sizes = {f"{m}x{n}": count for (m, n), count in model.items()}
        if whole and set(sizes) <= set(slow):
            svd = sum(count * slow[size] for size, count in sizes.items())
            return float(svd / whole[0]["seconds"])
    return None


def used_by(used: dict[str, int], found: Any) -> None:
    used[found.method] = used.get(found.method, 0) + 1


def _weight(run: Run, shape: tuple[int, int], seed: int) -> Tensor:
    """Bulk of Marchenko and Pastur with spikes, as weights of language models have it."""
    generator = torch.Generator(run.device).manual_seed(seed)
    m, n = shape
    spikes = max(1, min(shape) // 50)

    def gaussian(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=run.device)

    W = gaussian(m, n) / n**0.5
    W += (
        (gaussian(m, spikes) * torch.linspace(10, 3, spikes, device=run.device))
        @ gaussian(spikes, n)
        / (m * n) ** 0.5
    )
    return W.to(torch.bfloat16)


def _predicted(
    run: Run, shape: tuple[int, ...], rank: int, dtype: torch.dtype, method: str | None
) -> float:
    plan = plan_split(shape, rank, dtype=dtype, device=run.device)
    return plan.seconds[method or plan.method]


def _seconds(run: Run, call: Call) -> float:
    def wait() -> None:
        if run.device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def _line(row: dict[str, Any]) -> str:
    text = f"{row['matrix']:26} {row['method']:17} {row['seconds']:8.3f} s"
    if "predicted" in row:
        text += f"  predicted {row['predicted']:.3f} s"
    if "of_optimum" in row:
        text += f"  energy {row['of_optimum']:.7f} of optimum"
    if row.get("used", (first := row["method"].split()[0])) != first:
        text += f"  by {row['used']}"
    return text


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines, ratio = [_line(row) for row in rows], times_svd(rows)
    return lines if ratio is None else [*lines, f"a whole model: {ratio:.1f}x faster than by SVD"]
