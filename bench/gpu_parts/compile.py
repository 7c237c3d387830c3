"""All kernels of the script compiled at once, by as many processes as there are cores.

One by one, at their first launches, they would take minutes. Launches are recorded instead of run,
on the tensors that the other parts use; each is then compiled by Triton's own way to a launch, so
that the other parts find it in Triton's cache.
"""

from __future__ import annotations

import importlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import cases as C
from bench.checks import checks
from bench.gpu_parts.graph import operations
from bench.gpu_parts.kernels import cases, many_calls
from bench.gpu_parts.run import Run
from bench.gpu_parts.schedule import start_method


@dataclass(frozen=True)
class Pointer:
    """What a kernel is compiled for where it is given a tensor."""

    dtype: torch.dtype
    aligned: bool

    def data_ptr(self) -> int:
        return 0 if self.aligned else 1


@dataclass(frozen=True)
class Job:
    """One kernel as one launch wants it; equal for launches that share machine code."""

    module: str
    kernel: str
    arguments: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, int | bool], ...]
    arch: int
    on_device: bool

    @classmethod
    def of(cls, launch: Any, arch: int, on_device: bool) -> Job:
        function = launch.kernel.fn
        arguments = tuple(
            (p.name, _alike(p, launch.arguments[p.name])) for p in launch.kernel.params
        )
        options = tuple(launch.options.items())
        return cls(function.__module__, function.__name__, arguments, options, arch, on_device)


def _alike(parameter: Any, value: Any) -> Any:
    """One value for all that are compiled alike."""
    if isinstance(value, Tensor):
        aligned = value.data_ptr() % 16 == 0
        return Pointer(value.dtype, aligned or parameter.do_not_specialize)
    if parameter.is_constexpr or isinstance(value, float):
        return value if parameter.is_constexpr else 0.5
    wide = not -(2**31) <= value < 2**31
    if parameter.do_not_specialize:
        return 2**40 + 3 if wide else 3
    if value == 1:
        return 1
    return (2**40 if wide else 0) + (16 if value % 16 == 0 else 3)


def part_compile(run: Run) -> None:
    if not run.needs_device("compile"):
        return
    start = time.perf_counter()
    major, minor = torch.cuda.get_device_capability()
    jobs = list(dict.fromkeys(jobs_of(calls(run), 10 * major + minor, on_device=True)))
    torch.cuda.empty_cache()
    recorded = time.perf_counter() - start
    found = compiled(jobs, run.left - 2)
    run.results["compile"] = found | {"record_s": round(recorded, 1)}
    print(f"compile: {len(jobs)} kernels recorded in {recorded:.0f} s; {found}", flush=True)


def jobs_of(calls: Iterator[Callable[[], object]], arch: int, on_device: bool) -> Iterator[Job]:
    """What the calls would launch; nothing is launched."""
    from sculpt_kernels.triton import launcher

    with launcher.record() as launches:
        for call in calls:
            call()
            yield from (Job.of(launch, arch, on_device) for launch in launches)
            launches.clear()


def calls(run: Run) -> Iterator[Callable[[], object]]:
    """Every call of ours in the other parts, each on its own inputs."""
    parts = ("project", "adamw", "coordinates")
    for case in (case for part in parts for case in cases(run, part)):
        data = C.Inputs(case, run.device, seed=0)
        variants = C.variants(data)
        yield from (call for name, call in variants.items() if name.startswith("ours"))
        del data, variants
    for ratio in run.ratios[:2]:
        yield many_calls(run, ratio)["ours"]
    for operation in operations(run.device):
        state = operation.fresh()
        yield lambda operation=operation, state=state: operation.call(state)
    # What they find is wrong, since nothing runs, and is not looked at.
    yield from (measure for _, _, measure, _ in checks(run.device, run.tiny))


def compiled(jobs: list[Job], seconds: float) -> dict[str, Any]:
    """Compile in parallel for at most so long; what is not done then is compiled when it runs."""
    start = time.perf_counter()
    workers = max(1, min(len(jobs), (os.cpu_count() or 2) - 1))
    failed, spent = [], []
    pool = ProcessPoolExecutor(workers, mp_context=start_method())
    try:
        waiting = [pool.submit(compile_job, job) for job in jobs]
        for done in as_completed(waiting, timeout=max(0.1, seconds)):
            name, took, error = done.result()
            spent.append(took)
            if error is not None:
                failed.append(f"{name}: {error}")
    except TimeoutError:
        failed.append(f"{len(jobs) - len(spent)} were not done in {seconds:.0f} s")
    finally:
        processes = list(pool._processes.values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
    return {
        "kernels": len(jobs),
        "workers": workers,
        "seconds": round(time.perf_counter() - start, 1),
        "sum_of_kernels_s": round(sum(spent), 1),
        "failed": failed,
    }


# Triton keeps what it compiled by device, so that every target needs a number of its own.
_numbers = itertools.count(1000)


class Target:
    """Triton's driver of a device that need not be here, as far as compiling asks for it."""

    def __init__(self, arch: int) -> None:
        self.arch, self.number = arch, next(_numbers)

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def compile_job(job: Job) -> tuple[str, float, str | None]:
    """Name, seconds, and what went wrong."""
    start = time.perf_counter()
    error = None
    try:
        warm(job)
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"[:300]
    return job.kernel, time.perf_counter() - start, error


def warm(job: Job) -> Any:
    """The compiled kernel, in Triton's cache, with the launcher that Triton 3.6 builds in C."""
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime.driver import driver

    driver.set_active(Target(job.arch))
    kernel = getattr(importlib.import_module(job.module), job.kernel)
    found = kernel.warmup(grid=(1,), **dict(job.arguments), **dict(job.options))
    if job.on_device and hasattr(nvidia, "make_launcher"):
        nvidia.CudaLauncher(found.src, found.metadata)
    return found
