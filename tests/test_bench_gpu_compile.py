"""Kernels compiled ahead by the GPU script are those that launches then look for."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import triton
from triton.runtime.driver import driver as active

from bench.gpu_parts import compile as ahead
from sculpt_kernels.coordinates import triton_expand as expand_add
from sculpt_kernels.projection import triton as project
from sculpt_kernels.subspaces import triton_sketch as sketch

ARCH = 90


class Driver(ahead.Target):
    """A device that loads kernels and runs nothing."""

    utils = SimpleNamespace(
        load_binary=lambda name, cubin, shared, device: (1, name, 32, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
        unload_module=lambda module: None,
    )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *_: None


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, bool]]]:
    """An empty cache of Triton's and a driver; the kernels that are asked of it, and who had it."""
    asked: list[tuple[str, bool]] = []
    before = active._active
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))

    def listener(*, src: Any, cache_hit: bool, **_: Any) -> None:
        asked.append((src.name, cache_hit))

    monkeypatch.setattr(triton.knobs.compilation, "listener", listener)
    yield asked
    gc.collect()  # kernels are unloaded by the driver that loaded them
    active._active = before


def calls() -> list[Any]:
    """Ragged and regular sizes, addresses in tables, and seeds of either width."""
    bf16 = torch.bfloat16
    made = []
    for m, n, r in ((48, 80, 16), (37, 53, 7)):
        G, U, V = (torch.zeros(size, dtype=bf16) for size in ((m, n), (m, r), (n, r)))
        made.append(partial(project.project_, G, U, V, "core"))
    many = [torch.zeros(64, 64, dtype=bf16) for _ in range(2)]
    bases = [torch.zeros(64, 16, dtype=bf16) for _ in range(2)]
    cores = [torch.zeros(16, 16) for _ in range(2)]
    made.append(
        partial(
            expand_add.expand_add_many_, many, cores, bases, bases, 1.0, "stochastic",
            torch.tensor([1, 2**40]),
        )
    )  # fmt: skip
    made += [partial(sketch.sketch, torch.zeros(32, 16), seed, 0) for seed in (1, 2**40)]
    return made


def test_every_launch_finds_its_kernel(fresh: list[tuple[str, bool]]) -> None:
    jobs = list(dict.fromkeys(ahead.jobs_of(iter(calls()), ARCH, on_device=False)))
    for job in jobs:
        ahead.warm(job)
    assert [hit for _, hit in fresh] == [False] * len(jobs)  # none was compiled twice
    fresh.clear()
    active.set_active(Driver(ARCH))
    for kernel in {(job.module, job.kernel) for job in jobs}:
        function = getattr(__import__(kernel[0], fromlist=[""]), kernel[1])
        function.device_caches.clear()  # what this process has in memory
    for call in calls():
        call()
    assert fresh
    assert {name for name, _ in fresh} == {job.kernel for job in jobs}
    assert all(hit for _, hit in fresh), fresh
    assert len(fresh) == len(jobs)


def test_processes_compile_together_and_report_what_they_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ragged = partial(sketch.sketch, torch.zeros(33, 19), 1, 0)
    jobs = list(ahead.jobs_of(iter([ragged]), ARCH, on_device=False))
    missing = ahead.Job("sculpt_kernels.subspaces.triton_sketch", "no_kernel", (), (), ARCH, False)
    found = ahead.compiled([*jobs, missing], 300)
    assert len(jobs) == 1
    assert "no_kernel" in "".join(found["failed"])
    assert ahead.compiled(jobs, 0.0)["failed"] == ["1 were not done in 0 s"]
