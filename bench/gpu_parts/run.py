"""One call of the GPU script: options, deadline and results, and how a case is timed."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from typing import Any

import torch
from torch import Tensor

from bench import cases as C
from bench.timing import interleaved
from sculpt_kernels import backends, orthonormalize, project_

ROTATE_BYTES = 3 * 50 * 2**20
SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096)]
TINY_SHAPES = [(48, 80), (80, 48)]


class Run:
    """Options, deadline and results of one call; saved after every part."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.start = time.monotonic()
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        label = ("tiny-" if options.tiny else "") + name.replace(" ", "-")
        self.path = options.out / f"gpu-{label}.json"
        self.rates: dict[str, float] = {}
        self.wrong: set[str] = set()
        self.results: dict[str, Any] = {
            "device": name,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "backends": backends(),
            "tiny": options.tiny,
            "rows": [],
            "checks": [],
            "skipped": [],
        }
        try:
            import triton

            self.results["triton"] = triton.__version__
        except ImportError:
            self.results["triton"] = None

    @property
    def left(self) -> float:
        """Seconds until the time is over."""
        return self.options.minutes * 60 - (time.monotonic() - self.start)

    def save(self) -> None:
        self.results["seconds"] = round(time.monotonic() - self.start, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.results, indent=1))

    def shapes(self) -> list[tuple[int, int]]:
        return TINY_SHAPES if self.options.tiny else SHAPES

    def ratios(self) -> list[str]:
        return ["1/8", "3/4"] if self.options.tiny else list(C.RATIOS)

    def timed(self, case: C.Case, **extra: Any) -> None:
        """Time the variants of a case; a case that fails or finds no time left is noted."""
        if self.left < 5:
            self.results["skipped"].append(case.name)
            return
        key = case.operation if case.operation != "project" else case.form
        if key in self.wrong:
            self.results["skipped"].append(f"{case.name}: wrong result")
            return
        try:
            row = self._measure(case)
        except Exception as error:
            self.results["skipped"].append(f"{case.name}: {type(error).__name__}: {error}")
            return
        self.results["rows"].append(row | extra)
        print(short(row), flush=True)

    def _measure(self, case: C.Case) -> dict[str, Any]:
        first = C.Inputs(case, self.device, seed=0)
        size = first.G.numel() * first.G.element_size()
        count = 1 if self.options.tiny else max(2, min(6, -(-ROTATE_BYTES // size)))
        sets = [C.variants(first)]
        if case.operation == "project" and self.device.type == "cuda":
            _add_triton(sets[0], first)
        for seed in range(1, count):
            data = first.again(seed)
            sets.append(C.variants(data))
            if "triton" in sets[0]:
                _add_triton(sets[-1], data)
        found = interleaved(sets, self.device, rounds=5 if self.options.tiny else 11,
                            seconds=0.05 if self.options.tiny else 1.2)  # fmt: skip
        return row_of(case.name, found, self.floor(case)) | {"model": case.model, "rank": case.rank}

    def floor(self, case: C.Case) -> float:
        name = case.dtype if case.dtype in self.rates else "float32"
        device = self.device.type if self.device.type == "cpu" else "H100"
        return C.floor(case, device, self.rates[name], self.rates["copy"])


def _add_triton(variants: C.Variants, data: C.Inputs) -> None:
    """The Triton kernels also where `auto` leaves the products to the library."""
    form = data.case.form
    U = None if form == "right" else data.U
    V = None if form == "left" else data.V
    variants["triton"] = lambda: project_(data.G, U, V, form=form, backend="triton")


def row_of(name: str, found: dict[str, Any], floor: float) -> dict[str, Any]:
    return {
        "case": name,
        "floor_us": 1e6 * floor,
        "variants": {
            key: {"us": 1e6 * t.median, "p20": 1e6 * t.p20, "p80": 1e6 * t.p80,
                  "ratio": t.ratio, "roofline": floor / t.median, "rounds": t.rounds}
            for key, t in found.items()
        },
    }  # fmt: skip


def short(row: dict[str, Any]) -> str:
    cells = [f"{k} {v['us']:.0f}us {v['ratio']:.2f}x" for k, v in row["variants"].items()]
    ours = [v["roofline"] for k, v in row["variants"].items() if k.startswith(("ours", "triton"))]
    best = f"  roofline {max(ours):.0%}" if ours else ""
    return f"{row['case']:36} " + " | ".join(cells) + best


def random(
    device: torch.device, *shape: int, dtype: torch.dtype = torch.float32, basis: bool = False
) -> Tensor:
    X = torch.randn(*shape, device=device)
    return (orthonormalize(X) if basis else X).to(dtype)


def off(got: Tensor, want: Tensor) -> float:
    error = float((got.double() - want).norm() / want.norm())
    return error if error == error else float("inf")
