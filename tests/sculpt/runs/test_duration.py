"""What a dry run says about time: each thing that a run does, counted as often as it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import run_config

from sculpt.runs import duration
from sculpt.runs.duration import duration_of, matrix_seconds, protected_tasks
from sculpt.runs.prepare import Prepared


def test_every_part_counts_all_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = Prepared(run_config(tmp_path))
    targets = prepared.strategy.targets
    monkeypatch.setattr(duration, "_seconds_of_one", lambda *_: (1.0, 10.0))
    monkeypatch.setattr(duration, "seconds_of", lambda work: (work(), 2.0)[1])
    found = duration_of(prepared)
    assert (found.step, found.rows) == (2.0, 2)
    # The first task by its weights, the second by what the first one uses.
    assert found.subspaces == len(targets) + 2 * len(targets)
    calibrated = [-(-min(64, len(rows)) // 2) for rows in prepared.rows]
    assert found.statistics == 2.0 * (calibrated[0] + calibrated[1]), "an end and a beginning"
    assert found.certificates == 2 * 10 * len(targets)
    tests = [len(task.test) for task in prepared.tasks]
    assert found.tested == 2 * tests[0] + tests[1], "the first task is tested twice"
    assert found.tests == pytest.approx(2.0 * found.tested / tests[0])
    means = [sum(len(row.ids) for row in rows) / len(rows) for rows in prepared.rows]
    read = 3 * 2 * sum(means)  # three steps of two rows for each task
    assert found.training == pytest.approx(read * 2.0 / found.tokens)


def test_methods_pay_for_what_they_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = Prepared(run_config(tmp_path))
    targets = prepared.strategy.targets
    subspaces, certificates = matrix_seconds(targets, prepared.config)
    assert subspaces > 0 < certificates
    monkeypatch.setattr(duration, "_seconds_of_one", lambda *_: (1.0, 10.0))
    for changes, each in (
        ({}, (1, 10)),
        ({"certificate": "independent", "sculpt": {"subspaces": "weights"}}, (1, 11)),
        ({"method": "plain"}, (0, 0)),
    ):
        config = run_config(tmp_path, **changes)
        expected = tuple(len(targets) * seconds for seconds in each)
        assert matrix_seconds(targets, config) == expected


@pytest.mark.parametrize(
    ("changes", "begin", "end"),
    [
        ({}, 1, 1),
        ({"checkpoint": {"memory": True}}, 1, 2),
        ({"memory": "m"}, 2, 1),
        ({"sculpt": {"subspaces": "weights"}}, 0, 0),
        ({"method": "plain"}, 0, 0),
    ],
)
def test_tasks_that_are_protected_are_counted(
    tmp_path: Path, changes: dict[str, Any], begin: int, end: int
) -> None:
    assert protected_tasks(run_config(tmp_path, **changes), 2) == (begin, end)
