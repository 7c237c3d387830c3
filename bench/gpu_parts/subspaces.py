"""Subspaces of the matrices of LLaMA-2-7B: the library's decompositions, each method, a model."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu_parts.run import Run
from bench.subspaces import planted, spectra
from sculpt_kernels import split

# Shape of the weights and how many of them the model has.
MODEL = {(4096, 4096): 128, (4096, 11008): 96}
TINY_MODEL = {(96, 96): 2, (96, 160): 2}
TRAINABLE = 0.25
F32, F64 = torch.float32, torch.float64


def part_subspaces(run: Run) -> None:
    """What takes fractions of a second, and a whole model."""
    for m, n in _model(run):
        W, best = _planted(run, m, n)
        h, few = _preserved((m, n)), min(m, n) // 16
        ours: dict[str, tuple[Any, ...]] = {
            "spectral": (F32, h, "low", "spectral"),
            "gram float32": (F32, h, "low", "gram"),
            "gram float64": (F64, h, "low", "gram"),
            "range k/16": (F32, few, "high", "range"),
        }
        for name, how in ours.items():
            run.attempt(f"subspaces {m}x{n} {name}", 4.0, _split, run, W, best, name, *how)
        library = {
            "eigh float32": lambda W=W: torch.linalg.eigh(W @ W.T),
            "eigh float64": lambda W=W: torch.linalg.eigh(W.double() @ W.double().T),
            "svd_lowrank k/16": lambda W=W, few=few: torch.svd_lowrank(W, q=few, niter=2),
        }
        for name, call in library.items():
            run.attempt(f"subspaces {m}x{n} {name}", 4.0, _library, run, (m, n), name, call, 3)
    run.attempt("a whole model", 15.0, _whole_model, run)


def part_svd(run: Run) -> None:
    """The library's singular value decompositions, each once: they may take many seconds."""
    for m, n in _model(run):
        W, _ = _planted(run, m, n)
        torch.linalg.svd(W[:64, :64])  # loads the solvers' library
        drivers = ("gesvdj", "gesvda", "gesvd") if W.is_cuda else ()
        calls = {"svd": lambda W=W: torch.linalg.svd(W, full_matrices=False)}
        for driver in drivers:
            calls[f"svd {driver}"] = lambda W=W, d=driver: torch.linalg.svd(W, False, driver=d)
        for name, call in calls.items():
            run.attempt(f"subspaces {m}x{n} {name}", 8.0, _library, run, (m, n), name, call, 1)
    run.attempt("a whole model by svd", 0.0, _whole_model_by_svd, run)


def _model(run: Run) -> dict[tuple[int, int], int]:
    return TINY_MODEL if run.tiny else MODEL


def _name(run: Run) -> str:
    return f"LLaMA-2-7B, {sum(_model(run).values())} matrices"


def _preserved(shape: tuple[int, int]) -> int:
    return min(shape) - int(TRAINABLE * min(shape))


def _planted(run: Run, m: int, n: int) -> tuple[Tensor, float]:
    """A matrix with planted singular values, and the share of energy that the preserved hold."""
    values = spectra(min(m, n))["spikes"].square()
    best = float(values[: _preserved((m, n))].sum() / values.sum())
    return planted(m, n, values.sqrt(), run.device.type), best


def _split(
    run: Run, W: Tensor, best: float, name: str, dtype: torch.dtype, h: int, part: str, method: str
) -> None:
    """The first call allocates and loads."""
    spent, found = min(
        (_timed(run, lambda: split(W.to(dtype), rank=h, part=part, method=method))
         for _ in range(3)),
        key=lambda pair: pair[0],
    )  # fmt: skip
    shape = (W.shape[0], W.shape[1])
    row = {"matrix": f"{shape[0]}x{shape[1]}", "method": name, "seconds": spent,
           "used": found.method, "energy": found.energy}  # fmt: skip
    if part == "low":
        row |= {
            "of_optimum": found.energy / best,
        }
    run.add("subspaces", row)


def _library(
    run: Run, shape: tuple[int, int], name: str, call: Callable[[], Any], times: int
) -> None:
    spent = min(_timed(run, call)[0] for _ in range(times))
    row = {"matrix": f"{shape[0]}x{shape[1]}", "method": name, "seconds": spent}
    run.add("subspaces", row)


def _whole_model(run: Run) -> None:
    """All matrices one by one, as training asks for them: bfloat16 weights, bases exact in float64.

    Random bulks with spikes, each with its own seed. Out of time, the rest is taken to be like what
    was measured, and the row says how many that were.
    """
    model, used = _model(run), Counter[str]()
    total, done, lost = 0.0, 0, 0.0
    # Five seconds are for the exact spectra at the end.
    left = run.left - 5
    for part, (shape, count) in enumerate(model.items()):
        rank = _preserved(shape)
        spent: list[float] = []
        share = left / (len(model) - part)
        for seed in range(count):
            if spent and sum(spent) * (1 + 2 / len(spent)) > share:
                break
            W = _weight(run, shape, seed)
            seconds, low = _timed(run, lambda: split(W.double(), rank=rank))  # noqa: B023
            used[low.method] += 1
            spent.append(seconds)
        left -= sum(spent)
        total += count * sum(spent) / len(spent)
        done += len(spent)
        squares = torch.linalg.eigvalsh(W.double() @ W.double().T).flip(0)
        outside = float((low.U.T @ W.double()).square().sum() - squares[rank:].sum())
        lost = max(lost, outside / float(squares[:rank].sum()))
    run.add("subspaces", {
        "matrix": _name(run),
        "method": "auto float64",
        "seconds": total,
        "measured_matrices": done,
        "used": ", ".join(f"{name} {count}" for name, count in used.items()),
        "of_optimum": 1 - lost,
    })  # fmt: skip


def _whole_model_by_svd(run: Run) -> None:
    """What the library's choice would take, from one matrix of each shape."""
    rows = run.results["subspaces"]
    each = {row["matrix"]: row["seconds"] for row in rows if row["method"] == "svd"}
    seconds = sum(count * each[f"{m}x{n}"] for (m, n), count in _model(run).items())
    run.add("subspaces", {"matrix": _name(run), "method": "svd", "seconds": seconds})


def _weight(run: Run, shape: tuple[int, int], seed: int) -> Tensor:
    """Bulk of Marchenko and Pastur with spikes, as weights of language models have it."""
    generator = torch.Generator(run.device).manual_seed(seed)
    (m, n), spikes = shape, max(1, min(shape) // 50)

    def gaussian(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=run.device)

    sizes = torch.linspace(10, 3, spikes, device=run.device)
    W = gaussian(m, n) / n**0.5
    W += (gaussian(m, spikes) * sizes) @ gaussian(spikes, n) / (m * n) ** 0.5
    return W.to(torch.bfloat16)


def _timed(run: Run, call: Callable[[], Any]) -> tuple[float, Any]:
    def wait() -> None:
        if run.device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    found = call()
    wait()
    return time.perf_counter() - start, found
