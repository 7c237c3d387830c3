"""The measurements run: a rehearsal of the CPU comparisons on small shapes, and their tables."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from bench import checks, cpu, memory, subspaces, tables
from bench.cases import FORMS, OPERATIONS, Case, Inputs, floor, variants
from bench.timing import interleaved

BENCH = Path(tables.__file__).parent
CPU = torch.device("cpu")
EMPTY_PAGE = f"a {tables.BEGIN} old {tables.END} b"


def case_of(operation: str, ratio: str, dtype: str = "float32") -> Case:
    kind, form = ("project", operation) if operation in FORMS else (operation, "core")
    return Case(kind, form, (30, 44), ratio, dtype)


COMMANDS = [
    ".".join(path.relative_to(BENCH.parent).with_suffix("").parts)
    for path in BENCH.rglob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", COMMANDS)
def test_asking_for_help_measures_nothing(name, capsys):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage:")


def test_cpu_comparison_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setitem(cpu.MODELS, "SmolLM2-135M", [(24, 40)])
    monkeypatch.setattr(cpu, "ceilings", lambda *_, **__: {"float32": 1e11, "copy": 1e10})
    options = ["--models", "SmolLM2-135M", "--rounds", "3", "--seconds", "0"]
    options += ["--out", str(tmp_path)]
    cpu.main([*options, "--ratios", "1/2", "--operations", *OPERATIONS])
    cpu.main([*options, "--ratios", "1/4", "1/2"])
    (path,) = tmp_path.iterdir()
    results = json.loads(path.read_text())
    assert len(results["rows"]) == 2 * len(OPERATIONS) + 2
    core = [row for row in results["rows"] if row["operation"] == "core"]
    assert [row["case"] for row in core] == [
        f"core 24x40 {ratio} {dtype}"
        for dtype in ("float32", "bfloat16")
        for ratio in ("1/4", "1/2")
    ]
    assert all(row["variants"]["chain"]["ratio"] == 1 for row in results["rows"])
    assert len(results["runs"]) == 2
    for variant in results["rows"][0]["variants"].values():
        assert 0 < variant["largest_bytes"] <= variant["peak_bytes"]
    page = tables.filled(EMPTY_PAGE, [path])
    ratio = {row["case"]: row["variants"]["ours"]["ratio"] for row in core}
    cells = [f"{ratio[f'core 24x40 1/2 {dtype}']:.2f}" for dtype in ("float32", "bfloat16")]
    assert f"| {' / '.join(cells)} |" in page
    assert page.startswith("a ")
    assert page.endswith(" b")
    assert "old" not in page
    with pytest.raises(SystemExit, match="is of another machine or torch"):
        cpu.save(tmp_path, [], {}, results["machine"] | {"torch": "0"})


def test_the_tables_are_those_of_the_files():
    assert tables.main(["--check"]) == 0


@pytest.mark.parametrize("operation", ["core", "right", "compress", "expand_add", "adamw"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_wrong_is_not_timed(operation, dtype, monkeypatch):
    case = case_of(operation, "1/4", dtype)
    assert checks.incorrect(case, CPU) is None
    name = {"compress": "compress", "expand_add": "expand_add_", "adamw": "project_adamw_"}
    name = name.get(operation, "project")
    real = getattr(checks, name)
    if operation == "adamw":
        wrong = lambda *t, **options: real(*t, **options | {"lr": 1.1e-2})  # noqa: E731
    else:
        wrong = lambda *t, **options: real(*t, **options) * 1.1  # noqa: E731
    monkeypatch.setattr(checks, name, wrong)
    assert "above" in str(checks.incorrect(case, CPU))


def test_peak_memory_counts_what_lives_at_one_time():
    x = torch.ones(1000)

    def one_after_the_other():
        y = -x
        del y
        return x.exp()

    assert memory.peak(one_after_the_other).total == 4000
    assert memory.peak(lambda: (-x, x.exp())).total == 8000
    assert memory.peak(lambda: torch.cat((-x, x))).largest == 8000


@pytest.mark.parametrize("operation", [*FORMS, "compress", "expand_add"])
def test_variants_agree(operation):
    """What is timed against each other computes the same thing."""
    case = case_of(operation, "3/4")
    results = {}
    for name in variants(Inputs(case, CPU, seed=0)):
        data = Inputs(case, CPU, seed=0)
        returned = variants(data)[name]()
        in_place = operation == "expand_add" or (operation in FORMS and name != "naive")
        results[name] = data.G if in_place else returned
    for result in results.values():
        torch.testing.assert_close(result, results["naive"], rtol=1e-4, atol=1e-5)
    assert floor(case, "cpu", 1e11, 1e10) > 0


def test_subspace_comparison(tmp_path):
    path = tmp_path / "subspaces-cpu.json"
    options = ["--sizes", "24x40", "--trainable", "0.25", "--repeat", "1", "--out", str(path)]
    subspaces.main(options)
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 4 * len(subspaces.methods(18))
    for row in rows:
        assert row["seconds"] > 0
        loose = row["method"] in ("torch.svd_lowrank", "range, high")
        assert row["energy"] >= (0.9 if loose else 1 - 1e-6)
        assert row["defect"] <= 1e-5
    options[options.index("0.25")] = "0.5"
    subspaces.main([*options, "--spectra", "power"])
    subspaces.main([*options, "--spectra", "power"])
    added = json.loads(path.read_text())["rows"]
    assert len(added) == 5 * len(subspaces.methods(18))
    assert sum(row["trainable"] == 0.25 for row in added) == len(rows)
    page = tables.filled(EMPTY_PAGE, [path])
    (row,) = (r for r in added if (r["trainable"], r["method"]) == (0.5, "auto, low"))
    assert f" {row['speedup']:.2g}x |" in next(x for x in page.splitlines() if "| 0.5 |" in x)
    assert page.count("| 24x40 |") == 2


def test_timing_interleaves_and_compares_within_a_round():
    calls = []
    sets = [{"chain": lambda: calls.append("a"), "ours": lambda: calls.append("b")}]
    found = interleaved(sets, CPU, rounds=4, batch_seconds=0.0)
    assert found["chain"].ratio == 1
    assert found["ours"].rounds == 4
    # Back and forth, from another start each time; here one call makes a batch.
    assert calls[-8:] == list("abbabaab")
