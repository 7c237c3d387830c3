"""The measurements run: a rehearsal of the GPU script and of the CPU comparison on small shapes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import cpu, gpu
from bench.cases import Case, Inputs, floor, variants
from bench.timing import interleaved


def test_gpu_script_rehearses_on_the_cpu(tmp_path, capsys):
    assert gpu.main(["--tiny", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    results = json.loads(path.read_text())
    assert results["tiny"]
    assert results["checks"]
    assert all(check["ok"] for check in results["checks"])
    operations = {row["case"].split()[0] for row in results["rows"]}
    assert operations == {"adamw", "core", "strict", "left", "many", "compress", "expand_add"}
    subspaces = {row["method"]: row for row in results["subspaces"]}
    assert {"spectral", "gram float64", "eigh float64", "svd", "auto float64"} <= set(subspaces)
    assert subspaces["auto float64"]["measured_matrices"] == 4
    for row in results["subspaces"]:
        assert row["seconds"] > 0
        assert abs(row.get("of_optimum", 1) - 1) < 1e-5
    for row in results["rows"]:
        assert all(v["us"] > 0 and v["p20"] <= v["p80"] for v in row["variants"].values())
    table = capsys.readouterr().out.strip().splitlines()
    assert table[-1].startswith("wrote ")
    assert "checks failed: none" in table[-2]


def test_gpu_script_keeps_what_it_has_when_time_is_over(tmp_path):
    assert gpu.main(["--tiny", "--minutes", "0", "--out", str(tmp_path)]) == 0
    results = json.loads(next(tmp_path.iterdir()).read_text())
    assert results["rows"] == []
    assert any("core 48x80" in name for name in results["skipped"])


def test_gpu_script_times_nothing_that_is_wrong(tmp_path, monkeypatch):
    real = gpu.project

    def broken(G, U, V, **options):
        result = real(G, U, V, **options)
        return result * 1.1 if options.get("form") == "core" else result

    monkeypatch.setattr(gpu, "project", broken)
    assert gpu.main(["--tiny", "--only", "project", "--out", str(tmp_path)]) == 1
    results = json.loads(next(tmp_path.iterdir()).read_text())
    timed = {row["case"].split()[0] for row in results["rows"]}
    assert timed == {"strict", "left"}
    assert any(name.startswith("core") and "wrong" in name for name in results["skipped"])


def test_cpu_comparison(tmp_path, monkeypatch):
    monkeypatch.setitem(cpu.MODELS, "SmolLM2-135M", [(24, 40)])
    monkeypatch.setattr(cpu, "ceilings", lambda *_, **__: {"float32": 1e11, "copy": 1e10})
    options = ["--models", "SmolLM2-135M", "--ratios", "1/4", "--rounds", "3", "--seconds", "0.1"]
    operations = ["--operations", "core", "strict", "compress", "expand_add", "adamw"]
    cpu.main([*options, *operations, "--out", str(tmp_path)])
    results = json.loads(next(tmp_path.iterdir()).read_text())
    assert len(results["rows"]) == 10
    assert all(row["variants"]["chain"]["ratio"] == 1 for row in results["rows"])


@pytest.mark.parametrize("operation", ["core", "strict", "left", "right", "compress", "expand_add"])
def test_variants_agree(operation):
    """What is timed against each other computes the same thing."""
    projected = operation in ("core", "strict", "left", "right")
    case = Case(
        "project" if projected else operation,
        operation if projected else "core",
        (30, 44),
        "3/4",
        "float32",
    )
    results = {}
    for name in variants(Inputs(case, torch.device("cpu"), seed=0)):
        data = Inputs(case, torch.device("cpu"), seed=0)
        returned = variants(data)[name]()
        in_place = operation == "expand_add" or (projected and name != "naive")
        results[name] = data.G if in_place else returned
    for result in results.values():
        torch.testing.assert_close(result, results["naive"], rtol=1e-4, atol=1e-5)
    assert floor(case, "cpu", 1e11, 1e10) > 0


def test_timing_interleaves_and_compares_within_a_round():
    calls = []
    sets = [{"chain": lambda: calls.append("a"), "ours": lambda: calls.append("b")}]
    found = interleaved(sets, torch.device("cpu"), rounds=4, batch_seconds=0.0)
    assert found["chain"].ratio == 1
    assert found["ours"].rounds == 4
    assert calls[-8:] in (list("abbaabba"), list("baabbaab"))
