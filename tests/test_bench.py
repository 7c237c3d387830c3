"""The measurements run: a rehearsal of the CPU comparisons on small shapes."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from bench import correct, cpu, memory, subspaces, tables
from bench.cases import Case, Inputs, floor, variants
from bench.timing import interleaved


def test_cpu_comparison(tmp_path, monkeypatch):
    monkeypatch.setitem(cpu.MODELS, "SmolLM2-135M", [(24, 40)])
    monkeypatch.setattr(cpu, "ceilings", lambda *_, **__: {"float32": 1e11, "copy": 1e10})
    options = ["--models", "SmolLM2-135M", "--ratios", "1/4", "--rounds", "3", "--seconds", "0.1"]
    operations = ["--operations", "core", "strict", "compress", "expand_add", "adamw"]
    cpu.main([*options, *operations, "--out", str(tmp_path)])
    results = json.loads(next(tmp_path.iterdir()).read_text())
    assert len(results["rows"]) == 10
    assert all(row["variants"]["chain"]["ratio"] == 1 for row in results["rows"])


def test_cpu_comparison_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setitem(cpu.MODELS, "SmolLM2-135M", [(24, 40)])
    monkeypatch.setattr(cpu, "ceilings", lambda *_, **__: {"float32": 1e11, "copy": 1e10})
    options = [
        "--models",
        "SmolLM2-135M",
        "--rounds",
        "3",
        "--seconds",
        "0",
        "--out",
        str(tmp_path),
    ]
    cpu.main([*options, "--ratios", "1/2", "--dtypes", "float32"])
    cpu.main([*options, "--ratios", "1/4", "1/2", "--dtypes", "float32", "bfloat16"])
    (path,) = tmp_path.iterdir()
    results = json.loads(path.read_text())
    assert [row["case"] for row in results["rows"]] == [
        f"core 24x40 {ratio} {dtype}"
        for dtype in ("float32", "bfloat16")
        for ratio in ("1/4", "1/2")
    ]
    assert len(results["runs"]) == 2
    low = results["rows"][2]["variants"]["ours"]
    wide = results["rows"][0]["variants"]["ours"]
    assert low["of_float32"] == pytest.approx(low["ms"] / wide["ms"], rel=1e-3)
    assert 0 < low["largest_bytes"] <= low["peak_bytes"]
    page = tables.filled(f"a {tables.BEGIN} old {tables.END} b", [path])
    assert "| 24 x 40 | bfloat16 |" in page
    assert page.startswith("a ")
    assert page.endswith(" b")
    assert "old" not in page
    with pytest.raises(SystemExit, match="is of another machine or torch"):
        cpu.save(tmp_path, [], {}, results["machine"] | {"torch": "0"})


def test_cpu_comparison_as_without_bfloat16_instructions(tmp_path, monkeypatch):
    module = importlib.import_module("sculpt_kernels.projection.project")
    monkeypatch.setattr(module, "has_fast_products", module.has_fast_products)
    monkeypatch.setitem(cpu.MODELS, "SmolLM2-135M", [(24, 40)])
    monkeypatch.setattr(cpu, "ceilings", lambda *_, **__: {"float32": 1e11, "copy": 1e10})
    options = [
        "--models",
        "SmolLM2-135M",
        "--rounds",
        "3",
        "--seconds",
        "0",
        "--out",
        str(tmp_path),
    ]
    cpu.main([*options, "--ratios", "1/4", "--convert"])
    (path,) = tmp_path.iterdir()
    assert path.stem.endswith("-converting")
    assert not module.has_fast_products(torch.bfloat16, "cpu")
    assert "Time of bfloat16 / time of float32" in tables.filled(tables.BEGIN + tables.END, [path])


def test_the_tables_are_those_of_the_files():
    assert tables.main(["--check"]) == 0


@pytest.mark.parametrize("operation", ["core", "left", "right", "compress", "expand_add", "adamw"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_wrong_is_not_timed(operation, dtype, monkeypatch):
    projected = operation in ("core", "left", "right")
    kind, form = ("project", operation) if projected else (operation, "core")
    data = Inputs(Case(kind, form, (30, 44), "1/4", dtype), torch.device("cpu"), seed=0)
    assert correct.incorrect(data) is None
    if operation == "adamw":
        real = correct.project_adamw_
        monkeypatch.setattr(
            correct, "project_adamw_", lambda *t, **options: real(*t, **options | {"lr": 1.1e-4})
        )
    else:
        name = {"project": "project", "compress": "compress", "expand_add": "expand_add_"}[kind]
        real = getattr(correct, name)
        monkeypatch.setattr(correct, name, lambda *t, **options: real(*t, **options) * 1.1)
    assert "above" in str(correct.incorrect(data))


def test_peak_memory_counts_what_lives_at_one_time():
    x = torch.ones(1000)

    def one_after_the_other():
        y = -x
        del y
        return x.exp()

    assert memory.peak(one_after_the_other).total == 4000
    assert memory.peak(lambda: (-x, x.exp())).total == 8000
    assert memory.peak(lambda: torch.cat((-x, x))).largest == 8000


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


def test_subspace_comparison(tmp_path):
    path = tmp_path / "subspaces-cpu.json"
    options = ["--sizes", "24x40", "--trainable", "0.25", "--repeat", "1", "--out", str(path)]
    subspaces.main(options)
    rows = {(row["matrix"], row["method"]): row for row in json.loads(path.read_text())["rows"]}
    assert len(rows) == 4 * len(subspaces.methods(18))
    for (_, method), row in rows.items():
        assert row["seconds"] > 0
        assert row["energy"] >= (
            0.9 if method in ("torch.svd_lowrank", "range, high") else 1 - 1e-6
        )
        assert row["defect"] <= 1e-5
    options[options.index("0.25")] = "0.5"
    subspaces.main([*options, "--spectra", "power"])
    subspaces.main([*options, "--spectra", "power"])
    added = json.loads(path.read_text())["rows"]
    assert len(added) == 5 * len(subspaces.methods(18))
    assert sum(row["trainable"] == 0.25 for row in added) == len(rows)
    page = tables.filled(f"{tables.BEGIN}{tables.END}", [path])
    assert all(f"| 24x40 power | {share} | " in page for share in (0.25, 0.5))
    assert "| 24x40 repeated | 0.5 | " not in page


def test_timing_interleaves_and_compares_within_a_round():
    calls = []
    sets = [{"chain": lambda: calls.append("a"), "ours": lambda: calls.append("b")}]
    found = interleaved(sets, torch.device("cpu"), rounds=4, batch_seconds=0.0)
    assert found["chain"].ratio == 1
    assert found["ours"].rounds == 4
    # Back and forth, from another start each time; here one call makes a batch.
    assert calls[-8:] == list("abbabaab")
