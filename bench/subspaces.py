"""Subspace methods side by side: seconds, captured energy, angles, orthonormality.

    python -m bench.subspaces --real --out bench/results/subspaces-cpu.json
    python -m bench.subspaces --model --out bench/results/subspaces-cpu-model.json

Results are added to the file, matrix by matrix: what it holds of the same matrix and `--trainable`
is replaced, everything else stays.

Methods take turns on the same matrix, `--repeat` times: the median counts, and the median over
rounds of the ratio to `torch.linalg.svd`. The truth is an SVD in float64. `energy` is what the
preserved part captures over the optimum, `cosine` the mean squared cosine between the span that was
asked for and the true one, `defect` the largest entry of `QᵀQ - I`; for ours `Q` is the leading
basis beside the trailing one. `--model` splits all matrices of SmolLM2 instead, end to end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.machine import about
from sculpt.storage.files import write_json
from sculpt_kernels import split

Bases = tuple[Tensor, Tensor]
SPECTRA = ("spikes", "power", "rank", "repeated")
BASELINE = "torch.linalg.svd"


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
    A = torch.zeros(m, n, dtype=torch.float64, device=device)
    A.diagonal()[: min(m, n)] = values.to(device)
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


def matrices(options: argparse.Namespace) -> Iterator[tuple[str, Tensor]]:
    for size in options.sizes:
        m, n = (int(part) for part in size.split("x"))
        for name in options.spectra:
            yield f"{size} {name}", planted(m, n, spectra(min(m, n))[name], "cpu")
    if options.real:
        from sculpt.demo.models import minilm, smollm2

        layer = "model.layers.14"
        yield from weights(smollm2(), [f"{layer}.self_attn.q_proj", f"{layer}.mlp.up_proj"])
        layer = "encoder.layer.3"
        yield from weights(minilm(), [f"{layer}.attention.self.query", f"{layer}.output.dense"])


def weights(folder: Path, names: list[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Matrices of a model by name, or all of its layers, in float32."""
    from safetensors import safe_open

    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        layers = [key[: -len(".weight")] for key in sorted(file.keys()) if "proj.weight" in key]
        for name in layers if names is None else names:
            yield name, file.get_tensor(f"{name}.weight").float()


def methods(rank: int) -> dict[str, tuple[str, Callable[[Tensor], Bases]]]:
    """Which part each method finds, and how; the baseline first."""

    def ours(part: str, method: str, dtype: torch.dtype = torch.float32) -> Any:
        def run(W: Tensor) -> Bases:
            found = split(W.to(dtype), rank=rank, part=part, method=method)
            return found.U, found.V

        return part, run

    def library_svd(W: Tensor) -> Bases:
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        return U[:, :rank], Vh[:rank].T

    def library_eigh(W: Tensor) -> Bases:
        A = W if W.shape[0] <= W.shape[1] else W.T
        U = torch.linalg.eigh(A @ A.T).eigenvectors[:, -rank:]
        V = torch.linalg.qr(A.T @ U).Q
        return (U, V) if A is W else (V, U)

    def lowrank(W: Tensor) -> Bases:
        U, _, V = torch.svd_lowrank(W, q=rank, niter=2)
        return U, V

    return {
        BASELINE: ("high", library_svd),
        "torch.linalg.eigh": ("high", library_eigh),
        "torch.svd_lowrank": ("high", lowrank),
        "auto, low": ours("low", "auto"),
        "auto, high": ours("high", "auto"),
        "gram, float64, low": ours("low", "gram", torch.float64),
        "spectral, low": ours("low", "spectral"),
        "range, high": ours("high", "range"),
    }


def quality(
    W: Tensor,
    part: str,
    bases: Bases,
    truth: tuple[Tensor, Tensor, Tensor],
    rank: int,
    other: Bases | None = None,
) -> dict[str, float]:
    """What the file says; `other` are the bases of the other part."""
    U, V = (B.double() for B in bases)
    exact_U, S, exact_V = truth
    wide = W.double()
    if part == "high":
        captured = (U.T @ wide @ V).square().sum()
    else:
        # A trailing basis is judged by what it leaves, on the worse of its sides.
        taken = ((U.T @ wide).square().sum(), (wide @ V).square().sum())
        captured = wide.square().sum() - torch.stack(taken).max()
    columns = slice(None, rank) if part == "high" else slice(rank, None)
    cosines, defects = [], []
    for B, E, C in zip((U, V), (exact_U, exact_V), other or (None, None), strict=True):
        cosines.append(float((B.T @ E[:, columns]).square().sum() / B.shape[1]))
        both = B if C is None else torch.cat([B, C.double()], -1)
        eye = torch.eye(both.shape[1], dtype=both.dtype)
        defects.append(float((both.T @ both - eye).abs().max()))
    energy = float(captured / S[:rank].square().sum())
    return {"energy": energy, "cosine": min(cosines), "defect": max(defects)}


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def compare(name: str, W: Tensor, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per method and rank."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    for share in options.trainable:
        rank = min(W.shape) - int(share * min(W.shape))
        listed = methods(rank)
        spent: dict[str, list[float]] = {method: [] for method in listed}
        found: dict[str, Bases] = {}
        for _ in range(options.repeat):
            for method, (_, run) in listed.items():
                try:
                    seconds, found[method] = timed(lambda: run(W))  # noqa: B023
                except torch.linalg.LinAlgError as error:
                    print(f"{name}, t/k {share:g}: {method} failed: {error}")
                    continue
                spent[method].append(seconds)
        for method, (part, _) in listed.items():
            if len(spent[method]) < options.repeat:
                continue
            ratios = [a / b for a, b in zip(spent[BASELINE], spent[method], strict=True)]
            beside = {"auto, low": "auto, high", "auto, high": "auto, low"}.get(method)
            yield {
                "matrix": name,
                "trainable": share,
                "method": method,
                "seconds": statistics.median(spent[method]),
                "speedup": statistics.median(ratios),
                **quality(W, part, found[method], (U, S, Vh.T), rank, found.get(beside or "")),
            }


def whole_model() -> Iterator[dict[str, Any]]:
    """All matrices of SmolLM2 at t/k = 1/4, each by every way in turn; the worst qualities."""
    from sculpt.demo.models import smollm2

    exact = f"{BASELINE}, float64"
    ways = {"auto": torch.float32, "auto, float64": torch.float64}
    spent = dict.fromkeys((BASELINE, exact, *ways), 0.0)
    worst: dict[str, dict[str, float]] = {name: {} for name in spent}
    count = 0
    for _, W in weights(smollm2()):
        count += 1
        rank = min(W.shape) - int(0.25 * min(W.shape))
        truth = W
        for name, A in ((BASELINE, W), (exact, W.double())):
            seconds, truth = timed(lambda: torch.linalg.svd(A, full_matrices=False))  # noqa: B023
            spent[name] += seconds
        U, S, Vh = truth
        for name, dtype in ways.items():
            seconds, low = timed(lambda: split(W.to(dtype), rank=rank))  # noqa: B023
            spent[name] += seconds
            for key, value in quality(W, "low", (low.U, low.V), (U, S, Vh.T), rank).items():
                pick = max if key == "defect" else min
                worst[name][key] = pick(worst[name].get(key, value), value)
    for name, seconds in spent.items():
        yield {
            "matrix": f"SmolLM2, all {count} matrices",
            "trainable": 0.25,
            "method": name,
            "seconds": seconds,
            "speedup": spent[BASELINE] / seconds,
            **worst[name],
        }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", nargs="*", default=["256x256", "576x1536", "1024x2752"])
    parser.add_argument("--spectra", nargs="+", choices=SPECTRA, default=SPECTRA)
    parser.add_argument("--trainable", nargs="+", type=float, default=[0.125, 0.25, 0.5])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--real", action="store_true", help="weights of SmolLM2 and MiniLM too")
    parser.add_argument("--model", action="store_true", help="all of SmolLM2 instead")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.model:
        batches: Iterator[Iterator[dict[str, Any]]] = iter([whole_model()])
    else:
        batches = (compare(name, W, options) for name, W in matrices(options))
    for batch in batches:
        rows = list(batch)
        for row in rows:
            print(f"{row['matrix']:32} {row['trainable']:<6g} {row['method']:20} "
                  f"{row['seconds']:8.3f} s {row['speedup']:7.2f}x  energy lost "
                  f"{1 - row.get('energy', 1):.0e}", flush=True)  # fmt: skip
        if options.out:
            add(options.out, rows)


def add(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put rows into the file in the place of those of the same matrix and share."""
    kept = json.loads(path.read_text())["rows"] if path.exists() else []
    replaced = {(row["matrix"], row["trainable"]) for row in rows}
    kept = [row for row in kept if (row["matrix"], row["trainable"]) not in replaced]
    write_json(path, {"about": about(), "rows": kept + rows})


if __name__ == "__main__":
    main()
