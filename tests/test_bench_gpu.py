"""The script for a GPU: its parts rehearsed on the CPU, and what keeps a call on a device whole."""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import gpu, pictures, tables
from bench.cases import RATIOS, Case
from bench.gpu_parts import kernels, parts, sanitize, schedule
from bench.gpu_parts.run import Broken, Run, variant_sets
from bench.gpu_parts.training import METHODS
from sculpt.storage.files import write_json


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """An empty file of results, and a minute."""
    path = tmp_path / "gpu-tiny-cpu.json"
    rates = {"float32": 1e11, "copy": 1e10}
    write_json(path, gpu.EMPTY | {"tiny": True, "seconds": 0.0, "rates": rates})
    now = time.monotonic()
    options = argparse.Namespace(tiny=True, begun=now, deadline=now + 600)
    return Run(options, path, options.deadline)


def stored(run: Run) -> dict:
    return json.loads(run.path.read_text())


def test_it_rehearses_on_the_cpu(tmp_path, capfd):
    names = [name for name in parts.PARTS if name != "continual"]
    assert gpu.main(["--tiny", "--out", str(tmp_path), "--only", *names]) == 0
    (path,) = tmp_path.iterdir()
    results = json.loads(path.read_text())
    assert results["tiny"]
    assert results["checks"]
    assert all(check["ok"] for check in results["checks"])
    assert {name: part["state"] for name, part in results["parts"].items()} == dict.fromkeys(
        names, "done"
    )
    operations = {row["case"].split()[0] for row in results["rows"]}
    assert operations == {"adamw", "core", "strict", "left", "many", "compress", "expand_add"}
    subspaces = {row["method"]: row for row in results["subspaces"]}
    assert {"spectral", "gram float64", "eigh float64", "svd", "auto float64"} <= set(subspaces)
    assert subspaces["auto float64"]["measured_matrices"] == 4
    for row in results["subspaces"]:
        assert row["seconds"] > 0
        assert abs(row.get("of_optimum", 1) - 1) < 1e-5
    assert [row["method"] for row in results["training"]] == list(METHODS)
    exact, sketches = results["curvature"]
    assert 0 < sketches["bytes"] < exact["bytes"]
    assert min(exact["pass_seconds"], sketches["pass_seconds"]) > 0
    # What is skipped is what a CPU cannot do.
    assert all("no CUDA device" in reason for reason in results["skipped"])
    for row in (*results["rows"], *results["compiled"]):
        assert all(v["us"] > 0 and v["p20"] <= v["p80"] for v in row["variants"].values())
    assert results["compiled"]
    *_, last = capfd.readouterr().out.strip().splitlines()
    assert last.startswith("checks failed: none; ")


def test_time_that_is_over_leaves_what_there_is(run):
    run.deadline = time.monotonic()
    kernels.part_project(run)
    results = stored(run)
    assert results["rows"] == results["finished"] == []
    assert any(name.startswith("core 48x80 1/8 bfloat16: 0 s") for name in results["skipped"])


def fails() -> float:
    raise ValueError("no luck")


def test_a_check_that_just_fails_keeps_the_timing_and_one_that_cannot_be_made_does_not(run):
    run.check("core 1x1", 2e-3, 1e-3)
    run.check("left 1x1", float("nan"), 1e-3)
    run.attempt("check it", 0.0, run.checked, "it 1x1", fails, 1.0)
    assert [check["ok"] for check in stored(run)["checks"]] == [False, False, False]
    assert [run.is_wrong(name) for name in ("core", "left", "it")] == [False, True, True]
    assert stored(run)["skipped"] == ["check it: ValueError: no luck"]


def test_a_case_that_fails_is_noted_and_not_repeated(run):
    calls = []
    for _ in range(2):
        run.attempt("a case", 0.0, lambda: calls.append(1) or fails())
    assert len(calls) == 1
    assert stored(run)["skipped"] == ["a case: ValueError: no luck"]
    assert stored(run)["now"] is None


# Parts for processes: they live at the top of a module that those import.
def _hangs(run: Run) -> None:
    run.attempt("the first", 0.0, lambda: None)
    run.attempt("the one that hangs", 0.0, lambda: time.sleep(600))


def _dies_once(run: Run) -> None:
    run.attempt("one that kills", 0.0, lambda: os.kill(os.getpid(), signal.SIGSEGV))
    run.attempt("the next", 0.0, lambda: run.results["rows"].append("measured"))


def _breaks(run: Run) -> None:
    def breaks(free: bool) -> None:
        raise Broken("an illegal memory access")

    for name in "abcd":
        run._check_device = breaks  # type: ignore[method-assign]
        run.attempt(name, 0.0, lambda: None)


@pytest.fixture
def part(run: Run, monkeypatch: pytest.MonkeyPatch):
    """Run one of the parts above, by another name, with so many seconds."""
    context = schedule.multiprocessing.get_context("fork")
    monkeypatch.setattr(schedule, "start_method", lambda: context)
    monkeypatch.setattr(schedule, "GRACE", 1.0)

    def do(function, seconds: float) -> dict:
        monkeypatch.setitem(parts.PARTS, "one", schedule.Part(function, 1, seconds))
        run.options.tiny = False
        schedule.do("one", run.options, run.path)
        return stored(run)

    return do


def test_a_part_that_hangs_is_stopped_and_says_where(part):
    start = time.monotonic()
    results = part(_hangs, 2.0)
    assert time.monotonic() - start < 30
    assert results["parts"]["one"]["state"] == "stopped at its limit"
    assert results["finished"] == ["the first"]
    assert results["skipped"] == ["one: stopped at its limit, in the one that hangs"]


def test_a_part_whose_process_dies_goes_on_in_another_until_the_device_is_gone(part):
    results = part(_dies_once, 30.0)
    assert results["rows"] == ["measured"]
    assert results["skipped"] == [f"one that kills: died with exit code -{int(signal.SIGSEGV)}"]
    assert results["parts"]["one"]["state"] == "done"
    results = part(_breaks, 30.0)
    assert results["finished"][-3:] == ["a", "b", "c"]
    assert results["parts"]["one"]["state"].startswith("died: the device")


def test_resuming_leaves_out_what_is_done(tmp_path):
    options = ["--tiny", "--out", str(tmp_path), "--only", "coordinates"]
    assert gpu.main(options) == 0
    (path,) = tmp_path.iterdir()
    first = json.loads(path.read_text())
    first["parts"]["coordinates"]["state"] = "stopped at its limit"
    first["rows"].pop()
    first["finished"].pop()
    earlier = tmp_path / "earlier.json"
    write_json(earlier, first)
    assert gpu.main([*options, "--resume", str(earlier)]) == 0
    second = json.loads(path.read_text())
    assert second["rows"][:-1] == first["rows"]
    assert len(second["rows"]) == len(first["rows"]) + 1
    assert second["checks"] == first["checks"]
    write_json(earlier, first | {"device": "another"})
    with pytest.raises(SystemExit, match="must name results of this device, 'cpu'; got 'another'"):
        gpu.main([*options, "--resume", str(earlier)])


class Graph:
    """Stands for a captured CUDA graph: it keeps no launches, so a replay runs nothing."""

    captures = 0

    def replay(self) -> None:
        time.sleep(1e-6)

    def __enter__(self) -> Graph:
        return self

    def __exit__(self, *_: object) -> None:
        Graph.captures += 1


def test_on_a_device_it_times_captured_graphs(run, monkeypatch):
    """With a stand-in for the device: what is captured, and whose share of a replay is whose."""
    clock = iter(range(10**6))
    event = SimpleNamespace(
        record=lambda: None, elapsed_time=lambda end: float(next(clock) % 7 + 1)
    )
    for name, value in {
        "CUDAGraph": Graph, "graph": lambda graph: graph, "Event": lambda **_: event,
        "synchronize": lambda *_: None, "empty_cache": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    sets = variant_sets(
        Case("compress", "core", (48, 80), "1/8", "float32"), run.device, tiny=False
    )
    run.device, run.tiny = torch.device("cuda"), False
    found = run.measure(sets)
    assert Graph.captures == len(sets[0])
    assert set(found) == set(sets[0])
    for figures in found.values():
        assert figures["us"] > 0
        assert figures["called_us"] > 0
        assert figures["us"] <= 7e3 / len(sets)


def test_a_file_becomes_tables_and_pictures(tmp_path):
    """Of a device: figures as such a file has them."""
    variants = {
        "naive": {"us": 90.0, "ratio": 1.8, "roofline": 0.4},
        "chain": {"us": 50.0, "ratio": 1.0, "roofline": 0.7},
        "ours": {"us": 40.0, "ratio": 0.8, "roofline": 0.9, "called_ratio": 0.85},
        "triton": {"us": 60.0, "ratio": 1.2, "roofline": 0.6},
    }
    rows = [{"case": f"core 4096x4096 {ratio} bfloat16", "variants": variants} for ratio in RATIOS]
    phases = {"forward": 0.5, "backward": 1.0, "optimizer": 0.2, "fold": 0.03}
    step = {"phases": phases, "utilisation": 0.5, "tokens_per_second": 1e4, "peak_bytes": 6e10}
    step |= {"tokens": 16384, "optimizer_bytes": 2e9}
    content = gpu.EMPTY | {
        "device": "NVIDIA H100", "torch": "2.11.0", "triton": "3.6.0", "python": "3.12.3",
        "date": "2026-11-27", "tiny": False, "seconds": 500.0,
        "rates": {"copy": 3e12, "bfloat16": 8e14},
        "checks": [{"what": "core", "dtype": "bfloat16", "ok": False}],
        "rows": [*rows, {"case": "many 28 matrices 1/8 bfloat16", "variants": variants}],
        "compiled": [{"case": "core", "variants": variants | {"compiled": variants["naive"]}}],
        "subspaces": [
            {"matrix": "4096x4096", "method": "svd", "seconds": 6.0, "predicted": 5.0},
            {"matrix": "4096x4096", "method": "spectral", "seconds": 0.15, "of_optimum": 1.0},
        ],
        "training": [
            step | {"method": "plain", "seconds": 2.0},
            step | {"method": "sculpt 1/4", "seconds": 1.7},
        ],
        "skipped": ["training osf 0.25 16384: OutOfMemoryError"],
        "parts": {"project": {"state": "done", "seconds": 40.0, "predicted": 45.0}},
    }  # fmt: skip
    path = tmp_path / "gpu-NVIDIA-H100.json"
    write_json(path, content)
    page = tables.filled(f"a {tables.BEGIN} old {tables.END} b", [path])
    assert "(TFLOP/s): copy 3, bfloat16 800. 0 of 1" in page
    assert "0 of 1 checks passed; not: core bfloat16." in page
    row = "| core 4096x4096 1/8 bfloat16 | 50 | 40 | 0.80 | 0.85 | 90% | ours | naive 1.80, "
    assert row + "triton 1.20 |" in page
    assert "| 4096x4096 | spectral | 0.15 |  | 40.0x | 0e+00 |  |" in page
    assert "| sculpt 1/4 | 16,384 | 1.700 | 0.85 | 10,000 | 50% |" in page
    assert "Not measured: training osf 0.25 16384: OutOfMemoryError." in page
    pictures.gpu(path)
    drawn = sorted(picture.name for picture in tmp_path.glob("*.png"))
    assert drawn == [f"gpu-NVIDIA-H100-{key}.png" for key in ("rows", "subspaces", "training")]
    assert all(f"results/{name}" in page for name in drawn)


def test_small_cases_for_a_checker_of_memory(capsys):
    assert sanitize.main([]) == 0
    assert "wrong: none" in capsys.readouterr().out
