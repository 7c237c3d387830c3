"""Subspace methods side by side: seconds, captured energy, angles, orthonormality.

    python -m bench.subspaces --out bench/results/subspaces-cpu.json
    python -m bench.subspaces --sizes 4096x4096 4096x11008 --device cuda

Every method is timed on the same matrix in turn, `--repeat` times, and the median is kept. The
truth is an SVD in float64. `energy` is what the preserved bases capture over the optimum, `cosine`
the mean squared cosine between the preserved span and the true one, `defect` the largest entry of
`QᵀQ - I`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sculpt_kernels import split

Bases = tuple[Tensor, Tensor]


def spectra(k: int) -> dict[str, Tensor]:
    i = torch.arange(1, k + 1, dtype=torch.float64)
    return {
        "spikes": torch.where(i <= k // 50 + 1, 8.0, 1.0) + torch.linspace(0.5, 0, k).double(),
        "power": i**-0.5,
        "rank": torch.where(i <= k // 2, i**-0.25, 0.0),
        "repeated": torch.where(i <= k // 2, 1.0, 0.2),
    }


def planted(m: int, n: int, values: Tensor, device: str) -> Tensor:
    """Random matrix with given singular values; reflections keep it cheap at any size."""
    generator = torch.Generator().manual_seed(m + n)
    k = min(m, n)
    A = torch.zeros(m, n, dtype=torch.float64, device=device)
    A.diagonal()[:k] = values.to(device)
    for _ in range(4):
        for side in (0, 1):
            v = torch.randn(A.shape[side], generator=generator, dtype=torch.float64).to(device)
            v = (v / v.norm()).unsqueeze(1)
            A = A - 2 * v @ (v.T @ A) if side == 0 else A - 2 * (A @ v) @ v.T
    # Reflections alone leave the basis vectors sparse in the standard ones: mix by a random sign
    # pattern and a fast cosine-like transform, which are orthogonal too.
    signs = torch.sign(torch.randn(max(m, n), generator=generator, dtype=torch.float64)).to(device)
    for _ in range(2):
        A = _hartley(_hartley(A * signs[:n]).T * signs[:m]).T
    return A.float()


def _hartley(A: Tensor) -> Tensor:
    """Orthonormal Hartley transform of the rows."""
    F = torch.fft.fft(A, norm="ortho")
    return F.real - F.imag


def matrices(arguments: argparse.Namespace) -> Iterator[tuple[str, Tensor]]:
    for size in arguments.sizes:
        m, n = (int(part) for part in size.split("x"))
        for name, values in spectra(min(m, n)).items():
            yield f"{size} {name}", planted(m, n, values, arguments.device)
    if arguments.real:
        from safetensors import safe_open

        from sculpt.demo.models import minilm, smollm2

        picks = {
            "SmolLM2": (
                smollm2(),
                "model.layers.14.self_attn.q_proj",
                "model.layers.14.mlp.up_proj",
            ),
            "MiniLM": (
                minilm(),
                "encoder.layer.3.attention.self.query",
                "encoder.layer.3.output.dense",
            ),
        }
        for model, (folder, *names) in picks.items():
            with safe_open(str(Path(folder) / "model.safetensors"), framework="pt") as file:
                for name in names:
                    yield f"{model} {name}", file.get_tensor(f"{name}.weight").to(arguments.device)


def methods(rank: int) -> dict[str, Callable[[Tensor], Bases]]:
    """Leading bases of `rank` columns, by each method."""

    def ours(method: str, double: bool = False) -> Callable[[Tensor], Bases]:
        def run(W: Tensor) -> Bases:
            found = split(W.double() if double else W, rank=rank, part="high", method=method)
            return found.U, found.V

        return run

    def library_svd(W: Tensor) -> Bases:
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        return U[:, :rank], Vh[:rank].T

    def lowrank(W: Tensor) -> Bases:
        U, _, V = torch.svd_lowrank(W, q=rank, niter=2)
        return U, V

    return {
        "torch.linalg.svd": library_svd,
        "torch.svd_lowrank": lowrank,
        "auto": ours("auto"),
        "gram, float64": ours("gram", double=True),
        "spectral, float64": ours("spectral", double=True),
        "range": ours("range"),
    }


def quality(W: Tensor, bases: Bases, truth: tuple[Tensor, Tensor, Tensor], rank: int) -> dict:
    U, V = (B.double() for B in bases)
    exact_U, S, exact_V = truth
    captured = float((U.T @ W.double() @ V).square().sum() / S[:rank].square().sum())
    cosines = [
        float((B.T @ E[:, :rank]).square().sum() / rank) for B, E in ((U, exact_U), (V, exact_V))
    ]
    eye = torch.eye(rank, dtype=torch.float64, device=W.device)
    defect = max(float((B.T @ B - eye).abs().max()) for B in (U, V))
    return {"energy": captured, "cosine": min(cosines), "defect": defect}


def seconds(run: Callable[[], Any], device: str, repeat: int) -> float:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="*", default=["256x256", "576x1536", "1024x2752"])
    parser.add_argument("--trainable", nargs="+", type=float, default=[0.125, 0.25, 0.5])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--real", action="store_true", help="weights of SmolLM2 and MiniLM too")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    rows = []
    for name, W in matrices(arguments):
        U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
        for share in arguments.trainable:
            rank = min(W.shape) - int(share * min(W.shape))
            baseline = None
            for method, run in methods(rank).items():
                spent = seconds(lambda: run(W), arguments.device, arguments.repeat)  # noqa: B023
                baseline = baseline or spent
                found = quality(W, run(W), (U, S, Vh.T), rank)
                rows.append(
                    {
                        "matrix": name,
                        "trainable": share,
                        "method": method,
                        "seconds": spent,
                        "speedup": baseline / spent,
                        **found,
                    }
                )
    table = Table(title="against torch.linalg.svd of the same matrix")
    for title in (
        "matrix",
        "t/k",
        "method",
        "seconds",
        "speed-up",
        "1 - energy",
        "1 - cosine",
        "defect",
    ):
        table.add_column(title, justify="left" if title in ("matrix", "method") else "right")
    for row in rows:
        table.add_row(
            row["matrix"],
            f"{row['trainable']:g}",
            row["method"],
            f"{row['seconds']:.3f}",
            f"{row['speedup']:.2f}x",
            *(f"{x:.0e}" for x in (1 - row["energy"], 1 - row["cosine"], row["defect"])),
        )
    Console(width=150).print(table)
    if arguments.out:
        where = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine()
        about = {
            "device": where,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }
        partial = arguments.out.with_suffix(".partial")
        partial.write_text(json.dumps({"about": about, "rows": rows}, indent=1))
        partial.replace(arguments.out)


if __name__ == "__main__":
    main()
