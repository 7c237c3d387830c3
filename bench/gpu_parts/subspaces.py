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
# Seconds that must be left for a decomposition that may take long.
LONG = 40.0


def part_subspaces(run: Run) -> None:
    if run.left < 5:
        run.results["skipped"].append("subspaces")
        return
    rows: list[dict[str, Any]] = []
    run.results["subspaces"] = rows
    model = TINY_MODEL if run.options.tiny else MODEL
    torch.linalg.svd(torch.randn(64, 64, device=run.device))  # loads the solvers' library
    for shape in model:
        values = spectra(min(shape))["spikes"]
        W = planted(*shape, values, run.device.type)
        rank = min(shape) - int(TRAINABLE * min(shape))
        best = float(values[:rank].square().sum() / values.square().sum())
        for name, call, need in _calls(W, rank, first=shape == next(iter(model))):
            _one(run, rows, f"{shape[0]}x{shape[1]}", name, W, rank, best, call, need)
        run.save()
    if run.left < 20 and not run.options.tiny:
        run.results["skipped"].append("subspaces of a whole model")
        return
    _whole_model(run, rows, model)


Call = Callable[[], Any]


def _calls(W: Tensor, rank: int, first: bool) -> list[tuple[str, Call, float]]:
    """Name, call, and seconds that must be left; what decides comes first."""

    def ours(method: str, dtype: torch.dtype, part: str = "low", h: int = rank) -> Call:
        return lambda: split(W.to(dtype), rank=h, part=part, method=method)

    def eigh(dtype: torch.dtype) -> Call:
        return lambda: torch.linalg.eigh(W.to(dtype) @ W.to(dtype).T)

    few = min(W.shape) // 16
    calls: list[tuple[str, Call, float]] = [
        ("spectral", ours("spectral", torch.float32), 5.0),
        ("gram float32", ours("gram", torch.float32), 5.0),
        ("gram float64", ours("gram", torch.float64), 5.0),
        ("range k/16", ours("range", torch.float32, "high", few), 5.0),
        ("eigh float32", eigh(torch.float32), 5.0),
        ("eigh float64", eigh(torch.float64), 5.0),
        ("svd", lambda: torch.linalg.svd(W, full_matrices=False), LONG),
    ]
    if first:
        calls += [("svd_lowrank k/16", lambda: torch.svd_lowrank(W, q=few, niter=2), 5.0)]
    if first and W.device.type == "cuda":
        calls += [
            (f"svd {driver}", lambda d=driver: torch.linalg.svd(W, False, driver=d), LONG)
            for driver in ("gesvd", "gesvdj")
        ]
    return calls


def _one(
    run: Run,
    rows: list[dict[str, Any]],
    matrix: str,
    name: str,
    W: Tensor,
    rank: int,
    best: float,
    call: Call,
    need: float,
) -> None:
    if run.left < (need if not run.options.tiny else 1.0):
        run.results["skipped"].append(f"subspaces {matrix} {name}")
        return
    try:
        # The first call allocates and loads; a decomposition of seconds is not repeated for that.
        spent = [_seconds(run, call) for _ in range(1 if need == LONG else 3)]
        found = call() if name.startswith(("spectral", "gram", "range")) else None
    except Exception as error:
        run.results["skipped"].append(f"subspaces {matrix} {name}: {error}")
        return
    row: dict[str, Any] = {"matrix": matrix, "method": name, "seconds": min(spent)}
    method, *how = name.split()
    if method in ("spectral", "gram", "svd") and how in ([], ["float32"], ["float64"]):
        dtype = torch.float32 if how == ["float32"] or method == "svd" else torch.float64
        row["predicted"] = _predicted(run, tuple(W.shape), rank, dtype, method)
    if found is not None:
        row |= {"used": found.method, "energy": found.energy}
        if found.rank == rank:
            row["of_optimum"] = found.energy / best
    rows.append(row)
    print(_line(row), flush=True)


def _whole_model(run: Run, rows: list[dict[str, Any]], model: dict[tuple[int, int], int]) -> None:
    """All matrices one by one, as training asks for them: bfloat16 weights, bases exact in float64.

    Random bulks with spikes, each with its own seed. Out of time, the rest is taken to be like what
    was measured, and the row says how many that were.
    """
    total, done, predicted, lost = 0.0, 0, 0.0, 0.0
    used: dict[str, int] = {}
    for part, (shape, count) in enumerate(model.items()):
        rank = min(shape) - int(TRAINABLE * min(shape))
        predicted += count * _predicted(run, shape, rank, torch.float64, None)
        spent: list[float] = []
        share = run.left / (len(model) - part) - 3
        for seed in range(count):
            if spent and sum(spent) * (1 + 2 / len(spent)) > share:
                break
            W = _weight(run, shape, seed)
            seconds = _seconds(run, lambda: used_by(used, split(W.double(), rank=rank)))  # noqa: B023
            spent.append(seconds)
        total += count * sum(spent) / len(spent)
        done += len(spent)
        squares = torch.linalg.eigvalsh(W.double() @ W.double().T).flip(0)
        low = split(W.double(), rank=rank)
        left = float((low.U.T @ W.double()).square().sum() - squares[rank:].sum())
        lost = max(lost, left / float(squares[:rank].sum()))
    rows.append(
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
    slow = {row["matrix"]: row["seconds"] for row in rows if row["method"] == "svd"}
    sizes = [f"{m}x{n}" for m, n in model]
    if all(size in slow for size in sizes):
        svd = sum(count * slow[size] for size, count in zip(sizes, model.values(), strict=True))
        rows[-1] |= {"svd_seconds": svd, "times_svd": svd / total}


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
    if "times_svd" in row:
        text += f"  {row['times_svd']:.1f}x faster than SVD ({row['svd_seconds']:.0f} s)"
    if row.get("used", (first := row["method"].split()[0])) != first:
        text += f"  by {row['used']}"
    return text


def table(rows: list[dict[str, Any]]) -> list[str]:
    return [_line(row) for row in rows]
