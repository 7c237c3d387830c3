"""One call of the GPU script: options, deadline and results, and how a case is timed."""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import cases as C
from bench.timing import Timing, captured, interleaved
from sculpt.storage.files import write_json

ROTATE_BYTES = 3 * 50 * 2**20
SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096)]
TINY_SHAPES = [(48, 80), (80, 48)]
# An error so many times above its limit is no matter of rounding: what has it is not timed.
BEYOND_DOUBT = 100.0


class Broken(RuntimeError):
    """The device answers every call with an error, as after an access to memory that is not there:
    what is left of a part needs another process."""


class Run:
    """Options, deadline and results of one part; what is finished is in the file at once.

    Args:
        options: those of the script; `deadline` in the seconds of `time.monotonic()`.
        path: of the results, which the parts before this one may have begun.
        deadline: of this part.
    """

    def __init__(self, options: argparse.Namespace, path: Path, deadline: float) -> None:
        self.options = options
        self.tiny: bool = options.tiny
        self.path = path
        self.deadline = deadline
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self.rates: dict[str, float] = self.results.get("rates", {})
        self.shapes = TINY_SHAPES if self.tiny else SHAPES
        self.ratios = ["1/8", "3/4"] if self.tiny else list(C.RATIOS)

    @property
    def left(self) -> float:
        """Seconds until the time of this part is over."""
        return float(self.deadline - time.monotonic())

    def save(self) -> None:
        write_json(self.path, self.results)

    def needs_device(self, part: str) -> bool:
        """Whether there is one; where there is none, the part is noted as skipped."""
        if self.device.type != "cuda":
            self.skip(part, "no CUDA device")
        return self.device.type == "cuda"

    def attempt(
        self, case: str, seconds: float, call: Callable[..., None], *arguments: Any
    ) -> None:
        """Do a case that is not done yet, if `seconds` are left; note it if it fails.

        What is begun stands in the file, so that a process that dies in it says where it was.

        Raises:
            Broken: the device works no more in this process.
        """
        if case in self.results["finished"]:
            return
        if self.left < seconds:
            self.skip(case, f"{max(0.0, self.left):.0f} s were left, {seconds:.0f} s are needed")
            return
        self.results["now"] = case
        self.save()
        start, failed = time.monotonic(), False
        try:
            call(*arguments)
        except Exception as error:
            self.skip(case, error)
            failed = True
        self.results["finished"].append(case)
        self.results["now"] = None
        self.save()
        self._check_device(free=failed or time.monotonic() - start > 1)

    def _check_device(self, free: bool) -> None:
        if free:
            gc.collect()
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize()
            if free:
                torch.cuda.empty_cache()
        except RuntimeError as error:
            raise Broken(str(error)) from error

    def skip(self, case: str, reason: object) -> None:
        """Note a case that has no result, with the reason."""
        if isinstance(reason, Exception):
            reason = f"{type(reason).__name__}: {reason}"
        text = " ".join(str(reason).split())[:300]
        self.results["skipped"].append(f"{case}: {text}")
        print(f"skipped {case}: {text}", flush=True)
        self.save()

    def add(self, kind: str, row: dict[str, Any]) -> None:
        """Add to a list of results, and say so."""
        self.results[kind].append(row)
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()
                 if isinstance(v, str | int | float)}  # fmt: skip
        if "variants" in row:
            shown |= {k: f"{v['us']:.0f} us, {v['ratio']:.2f}x, roofline {v['roofline']:.0%}"
                      for k, v in row["variants"].items()}  # fmt: skip
        print(kind, *(f"{k} {v};" for k, v in shown.items()), flush=True)

    def check(self, what: str, error: float, limit: float, dtype: str = "") -> None:
        """Note what a check found; NaN never passes."""
        ok = error <= limit
        # JSON has no infinity.
        finite = error if error < float("inf") else None
        about = {"what": what, "dtype": dtype, "error": finite, "limit": limit, "ok": ok}
        self.results["checks"].append(about)
        if not ok:
            print(f"WRONG {what} {dtype}: error {error:.2e}, limit {limit:.2e}", flush=True)

    def checked(
        self, what: str, measure: Callable[[], float], limit: float, dtype: str = ""
    ) -> None:
        """Measure an error and note it; what cannot be measured is wrong."""
        try:
            error = measure()
        except Exception:
            self.check(what, float("inf"), limit, dtype)
            raise
        self.check(what, error, limit, dtype)

    def is_wrong(self, operation: str) -> bool:
        """Whether a check of an operation failed by far."""
        return any(
            check["what"].split()[0] == operation
            and not check["ok"]
            and (check["error"] is None or check["error"] > BEYOND_DOUBT * check["limit"])
            for check in self.results["checks"]
        )

    def time_case(self, case: C.Case) -> None:
        """Time the variants of a case."""
        self.attempt(case.name, 5.0, self._time, case)

    def _time(self, case: C.Case) -> None:
        if self.is_wrong(case.name.split()[0]):
            raise ValueError("wrong result")
        found = self.measure(variant_sets(case, self.device, self.tiny))
        self.add("rows", row_of(case.name, found, self.floor(case)) | {"rank": case.rank})

    def measure(self, sets: list[C.Variants], seconds: float = 0.6) -> dict[str, dict[str, Any]]:
        """Microseconds of every variant, and on a GPU also as called from Python.

        There the device's own time is that of a captured graph, which no launch from Python delays.
        """
        found = self.called(sets, seconds / 2)
        if self.device.type == "cuda":
            replayed = interleaved([captured(sets)], self.device, rounds=9, seconds=seconds)
            for name, timing in replayed.items():
                eager = {"called_us": found[name]["us"], "called_ratio": found[name]["ratio"]}
                found[name] = figures(timing, 1 / len(sets)) | eager
        return found

    def called(self, sets: list[C.Variants], seconds: float = 0.3) -> dict[str, dict[str, Any]]:
        """Microseconds of every variant, as called from Python."""
        seconds = 0.05 if self.tiny else seconds
        timings = interleaved(sets, self.device, rounds=5, seconds=seconds)
        return {name: figures(timing) for name, timing in timings.items()}

    def floor(self, case: C.Case) -> float:
        name = case.dtype if case.dtype in self.rates else "float32"
        device = self.device.type if self.device.type == "cpu" else "H100"
        return C.floor(case, device, self.rates[name], self.rates["copy"])


def variant_sets(
    case: C.Case, device: torch.device, tiny: bool, compiled: bool = False
) -> list[C.Variants]:
    """The variants on as many sets of inputs as a large cache cannot hold."""
    first = C.Inputs(case, device, seed=0)
    size = first.G.numel() * first.G.element_size()
    count = 1 if tiny else max(2, min(6, -(-ROTATE_BYTES // size)))
    sets = []
    for seed in range(count):
        data = first if seed == 0 else first.again(seed)
        sets.append(C.variants(data, compiled=compiled))
    return sets


def figures(timing: Timing, share: float = 1.0) -> dict[str, Any]:
    """A timing in microseconds, of which a call is `share`."""
    times = {"us": timing.median, "p20": timing.p20, "p80": timing.p80}
    found: dict[str, Any] = {key: 1e6 * share * seconds for key, seconds in times.items()}
    return found | {"ratio": timing.ratio, "rounds": timing.rounds}


def row_of(name: str, found: dict[str, dict[str, Any]], floor: float) -> dict[str, Any]:
    return {
        "case": name,
        "floor_us": 1e6 * floor,
        "variants": {key: v | {"roofline": 1e6 * floor / v["us"]} for key, v in found.items()},
    }
