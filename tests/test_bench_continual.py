"""The runner of task sequences: skips, resumes, searches, and shows what the files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import run_until

from bench import continual, gpu, pictures
from bench.continual import VARIANTS, Plan, compute, describe, run_config, searched
from bench.continual_table import accuracy, runs_in, sequences
from bench.rehearsal import tiny_data, tiny_model
from sculpt.runs.start import run
from sculpt.storage.files import write_json

BASE = {
    "training.steps": 2,
    "training.batch_size": 4,
    "training.lr": 1e-3,
    "data.test_rows": 6,
    "checkpoint.models": "none",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and data, and runs in this process, which is quicker."""
    tiny_model(tmp_path / "tiny")
    tiny_data(tmp_path / "data")

    def at_once(config: Any, about: dict[str, Any], path: Path, threads: int) -> bool:
        compute(config, about, path, threads)
        return True

    monkeypatch.setattr(continual, "in_a_process", at_once)
    return tmp_path


def call(here: Path, *more: str) -> int:
    values = [f"{key}={json.dumps(value)}" for key, value in BASE.items()]
    places = ("--model", here / "tiny", "--data", here / "data", "--out", here / "out")
    paths = ("--work", here / "work", "--threads", "1")
    return continual.main([*values, *more, *map(str, places + paths)])


def test_runs_leave_a_file_each_and_are_not_done_twice(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--orders", "1", "3", "--variants", "plain", "frozen")
    more += ("--variant", "half", "sculpt.unfreeze_rank_ratio=0.5")
    assert call(here, *more) == 0
    files = {path.name: path for path in (here / "out").glob("*.json")}
    assert len(files) == 6
    before = {name: path.read_bytes() for name, path in files.items()}
    found = json.loads(before["run-tiny-order-3-half-seed-0.json"])
    assert [task["name"] for task in found["tasks"]] == ["yahoo", "amazon", "agnews", "dbpedia"]
    assert found["config"]["sculpt"]["unfreeze_rank_ratio"] == 0.5
    assert len(found["generated"]) == 4
    assert found["seconds"]["train"] > 0
    assert found["peak_memory_bytes"] > 0
    assert found["leak"]["leak"] <= found["leak"]["limit"]
    assert str(here) not in json.dumps(found)
    assert sequences(runs_in(here / "out")).count("\n| ") == 5  # the head and its rule
    pictures.continual(here / "out")
    assert (here / "out" / "continual.png").stat().st_size > 1000
    capsys.readouterr()
    assert call(here, *more, "--seeds", "0") == 0
    assert "of 6" not in capsys.readouterr().out
    assert {name: path.read_bytes() for name, path in files.items()} == before


def test_an_interrupted_run_is_taken_up(here: Path) -> None:
    plan = Plan("replay", "1", 0, VARIANTS["replay"])
    work = here / "work" / plan.name(here / "tiny")
    config = run_config(plan, {**BASE, "model": str(here / "tiny")}, here / "data", work)

    run_until(config, lambda now: (now.task, now.phase) == ("yahoo", "train"))
    assert call(here, "--orders", "1", "--variants", "replay") == 0
    one = json.loads((here / "out" / f"{plan.name(here / 'tiny')}.json").read_text())
    whole = run(config.model_copy(update={"out": here / "whole"}))
    write_json(here / "whole.json", describe(config, whole))
    assert one["config"]["replay"] == {"rows": 32, "share": 0.25}
    assert one["generated"] == json.loads((here / "whole.json").read_text())["generated"]
    assert not work.exists()


def test_a_search_never_sees_test_rows_and_its_best_rate_is_used(here: Path) -> None:
    for path in (here / "data").glob("*/test.json"):
        path.rename(path.with_name("hidden"))
    more = ("--orders", "2", "--variants", "plain", "--search", "1e-5", "1e-2")
    assert call(here, *more, "--only-search") == 0
    rates = {run["config"]["training"]["lr"]: accuracy(run) for run in runs_in(here / "out")}
    assert set(rates) == {1e-5, 1e-2}
    best = max(rates, key=lambda lr: (rates[lr], -lr))
    assert searched(here / "out", here / "tiny") == {"plain": best}
    for path in (here / "data").glob("*/hidden"):
        path.rename(path.with_name("test.json"))
    assert call(here, *more) == 0
    (done,) = (run for run in runs_in(here / "out") if not run["search"])
    assert done["config"]["training"]["lr"] == best
    assert "held-out training rows" in sequences(runs_in(here / "out"))


def test_a_run_at_a_rate_that_a_search_replaced_is_done_again(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--orders", "1", "--variants", "plain")
    assert call(here, *more) == 0
    assert call(here, *more, "--search", "1e-4") == 0
    assert "1 of 1: run-" in capsys.readouterr().out
    (done,) = (run for run in runs_in(here / "out") if not run["search"])
    assert done["config"]["training"]["lr"] == 1e-4
    assert call(here, *more) == 0
    assert "1 of 1" not in capsys.readouterr().out


def written(folder: Path, variant: str, seed: int, score: float, load: float = 1.0) -> None:
    metrics = {"average_accuracy": score, "forgetting": 0.25}
    values = {
        "variant": variant, "order": "1", "seed": seed, "search": False, "short_prompts": False,
        "date": "2026-01-02", "machine": {"cpu": "some", "threads": 1}, "load": [1.0, load],
        "model": "tiny", "versions": {"torch": "2"}, "total_seconds": 8.0, "step_seconds": 0.5,
        "config": {"training": {"lr": 1e-5, "steps": 3, "batch_size": 4}},
        "tasks": [{"name": "one", "train": 5, "test": 6}], "trainable_elements": 1000,
        "metrics": {"generated": metrics, "among_labels": metrics},
        "held_bytes": 2**20, "optimizer_state_bytes": 2**20, "peak_memory_bytes": 2**30,
    }  # fmt: skip
    (folder / f"run-{variant}-{seed}.json").write_text(json.dumps(values), encoding="utf-8")


def test_the_table_has_means_spreads_and_the_best_first(tmp_path: Path) -> None:
    written(tmp_path, "plain", 0, 0.4)
    written(tmp_path, "sculpt", 0, 0.5)
    written(tmp_path, "sculpt", 1, 0.7)
    shown = sequences(runs_in(tmp_path))
    lines = [line for line in shown.splitlines() if line.startswith("| ")]
    sculpt = "| sculpt | 1e-05 | 0.600 ± 0.141 | **0.600** ± 0.141 | +0.100 (1) | 0.600 | 0.250 "
    assert lines[2] == sculpt + "| 1,000 | 2.0 | 1,024 | 0.50 | 8 | 2 |"
    assert lines[3].startswith("| plain | 1e-05 | 0.400 | **0.400** |  |")
    assert "no measurement" not in shown
    written(tmp_path, "plain", 1, 0.4, load=2.0)
    shown = sequences(runs_in(tmp_path))
    assert "no measurement of time" in shown
    # Differences 0.1 and 0.3: their deviation is 0.141, that of their mean 0.1.
    assert "| +0.200 ± 0.100 (2) |" in shown
    assert sequences(runs_in(tmp_path / "nothing")) == ""
    pictures.continual(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_short_prompts_lose_instruction_and_options(tmp_path: Path) -> None:
    short = continual.shorten(tiny_data(tmp_path / "data"), tmp_path / "short")
    long = json.loads((tmp_path / "data/yahoo/test.json").read_text())
    rows = json.loads((short / "yahoo/test.json").read_text())
    assert [row["answer"] for row in rows] == [row["answer"] for row in long]
    for row, whole in zip(rows, long, strict=True):
        assert whole["prompt"] == f"Choose one.\nOption: Health, Sports \n{row['prompt']}"


def test_the_gpu_part_rehearses(tmp_path: Path) -> None:
    assert gpu.main(["--tiny", "--only", "continual", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "gpu-tiny-cpu.json").read_text())
    assert [row["variant"] for row in results["continual"]] == list(VARIANTS)
    assert results["skipped"] == []
    for row in results["continual"]:
        assert 0 <= accuracy(row) <= 1
        assert (row["trainable_elements"] == 0) == (row["variant"] == "frozen")
