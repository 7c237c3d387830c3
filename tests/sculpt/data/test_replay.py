"""Rows of earlier tasks among those of a task, in a loop of one's own and in runs."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import run_config

from sculpt import Replay
from sculpt.runs.method import batches_of
from sculpt.runs.prepare import Prepared
from sculpt.runs.start import run


def test_every_batch_has_its_share_of_rows_that_were_kept() -> None:
    replay: Replay[str] = Replay(rows=3, share=0.5, seed=7)
    tasks = [[f"{task}{row}" for row in range(10)] for task in "abc"]
    for number, rows in enumerate(tasks):
        batches = list(islice(replay.batches(rows, 4), 15))
        own = 2 if number else 4
        for batch in batches:
            assert len(batch) == 4
            assert {row[0] for row in batch[:own]} == {"abc"[number]}
            assert {row[0] for row in batch[own:]} <= set("abc"[:number])
        # Every row of the task before any again, and so with those that are kept.
        new = [row for batch in batches for row in batch[:own]]
        assert Counter(new[:10]) == Counter(rows)
        old = [row for batch in batches for row in batch[own:]]
        kept = [row for task in replay.kept for row in task]
        assert Counter(old) == Counter({row: 30 // len(kept) for row in kept})
        assert list(islice(replay.batches(rows, 4, skip=6), 9)) == batches[6:]
        replay.keep(rows)
    assert [len(set(kept)) for kept in replay.kept] == [3, 3, 3]
    assert all(set(kept) < set(rows) for kept, rows in zip(replay.kept, tasks, strict=True))

    # Another loop that takes up with what was kept goes on the same way; another seed does not.
    again, other = Replay(rows=3, share=0.5, seed=7), Replay(rows=3, share=0.5, seed=8)
    again.kept = other.kept = replay.kept
    rows = list(range(10))
    first = list(islice(replay.batches(rows, 4), 5))
    assert list(islice(again.batches(rows, 4), 5)) == first
    assert list(islice(other.batches(rows, 4), 5)) != first


def test_what_cannot_be_mixed_is_refused() -> None:
    for rows, share, message in (
        (0, 0.5, "rows=0, expected at least 1"),
        (8, 0.0, "share=0.0, expected a number above 0 and below 1"),
        (8, 1, "share=1, expected a number above 0 and below 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Replay(rows, share)
    with pytest.raises(TypeError, match=r"rows must be an int; got 0\.5"):
        Replay(0.5, 8)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="share must be a number; got 'half'"):
        Replay(8, "half")  # type: ignore[arg-type]
    replay: Replay[int] = Replay(8, 0.1)
    with pytest.raises(ValueError, match=r"share=0\.1 of batches of 4 rows is 0 rows, .* 1 to 3"):
        replay.batches([1, 2], 4)  # in the first task, before anything is trained
    for call in (replay.keep, lambda rows: replay.batches(rows, 16)):
        with pytest.raises(ValueError, match="rows is empty"):
            call([])


def strategy_of(folder: Path, method: str, **changes: Any) -> Any:
    return Prepared(run_config(folder, method=method, **changes)).strategy


def row_ids(rows: Any) -> list[tuple[int, ...]]:
    return [row.ids for row in rows]


@pytest.mark.parametrize("method", ["plain", "sculpt"])
@pytest.mark.parametrize("order", ["shuffled", "bucketed"])
def test_runs_mix_in_rows_of_earlier_tasks(method: str, order: str, tmp_path: Path) -> None:
    training = {"epochs": 3, "batch_size": 4, "lr": 1e-3, "order": order}
    replay = {"share": 0.25, "rows": 3}
    strategy = strategy_of(tmp_path, method, training=training, replay=replay)
    now, before = (set(row_ids(rows)) for rows in reversed(strategy.setting.rows))
    first = list(islice(strategy.batches(0, skip=0), 4))
    assert all(set(row_ids(batch)) <= before for batch in first)
    assert {len(batch) for batch in first} == {4}
    batches = [row_ids(batch) for batch in islice(strategy.batches(1, skip=0), 12)]
    for batch in batches:
        assert Counter(ids in before for ids in batch) == {True: 1, False: 3}
        assert sum(ids in now for ids in batch) == 3
    replayed = Counter(ids for batch in batches for ids in batch if ids in before)
    assert sorted(replayed.values()) == [4, 4, 4]  # three rows are kept, each in turn
    later = [row_ids(batch) for batch in islice(strategy.batches(1, skip=5), 7)]
    assert later == batches[5:]
    # In the order that the run asks for.
    own = batches_of(strategy.setting.rows[1], strategy.config.training, 1, size=3)
    assert [batch[:3] for batch in batches] == [row_ids(rows) for rows in islice(own, 12)]
    # Three passes over four rows of its own, three of them in a batch.
    assert [strategy.steps(task) for task in (0, 1)] == [3, 4]


def test_a_run_of_sculpt_replays_and_protects(tmp_path: Path) -> None:
    """Two ways to keep what earlier tasks learned, together."""
    results = {}
    for name, replay in (("without", None), ("with", {"share": 0.5, "rows": 2})):
        config = run_config(tmp_path, out=str(tmp_path / name), replay=replay)
        results[name] = run(config).methods["sculpt"]
    first, second = zip(*(result.losses for result in results.values()), strict=True)
    assert first[0] == first[1]
    assert second[0] != second[1]
    for result in results.values():
        assert all(certificate.ok for certificate in result.certificates)
        assert all("ratio" in row["method"] for row in result.subspaces[1])


@pytest.mark.parametrize(
    ("method", "replay", "message"),
    [
        ("plain", {"share": 0.9, "rows": 2}, r"replay\.share=0\.9 of batches of 2 rows is 2 rows"),
        ("plain", {"share": 0.1, "rows": 2}, r"replay\.share=0\.1 .*\(training\.batch_size\)"),
        ("plain", {"share": 1.0, "rows": 2}, r"replay\.share\n"),
        ("plain", {"share": 0.5}, r"replay\.rows\n  Field required"),
        ("multitask", {"share": 0.5, "rows": 2}, r"replay is for .* method='multitask' makes"),
    ],
)
def test_runs_refuse_what_cannot_be_replayed(
    method: str, replay: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        strategy_of(tmp_path, method, replay=replay)
