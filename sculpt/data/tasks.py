"""Read the tasks of a run: rows of files, held out for the test, drawn by a seed."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from pathlib import Path

from sculpt.data.config import DataConfig, TaskConfig
from sculpt.data.examples import DataError, Example, Task
from sculpt.data.folders import folder_tasks
from sculpt.data.layouts import examples_of
from sculpt.data.rows import BadRows, read_rows
from sculpt.messages import SculptWarning


def read_tasks(data: DataConfig, seed: int, bad: BadRows | None = None) -> list[Task]:
    """All tasks in order; rows are drawn with `seed`.

    `bad` collects the rows that were left out. Raises `DataError` for data that cannot be used, and
    warns of test rows that are training rows too.
    """
    if data.builtin == "demo":
        from sculpt.demo.tasks import demo_tasks

        sizes = {"train_per_task": data.train_rows, "test_per_task": data.test_rows}
        return demo_tasks(seed, **{key: value for key, value in sizes.items() if value})
    bad = bad if bad is not None else BadRows(data.skip_bad_rows)
    configs = data.tasks if data.folder is None else folder_tasks(data.folder, data.order)
    tasks = [_read_task(config, data, seed, bad) for config in configs]
    _warn_of_shared_rows(tasks)
    return tasks


def _read_task(config: TaskConfig, data: DataConfig, seed: int, bad: BadRows) -> Task:
    def examples(path: Path) -> list[Example]:
        return examples_of(read_rows(path, bad), config, bad)

    train = examples(config.train)
    rng = random.Random(f"{config.name}/{seed}")
    if config.test is not None:
        if config.test.exists() and config.test.samefile(config.train):
            raise DataError(
                f"task {config.name!r} is tested on the file that trains it: train={config.train}, "
                f"test={config.test}; without a test file {data.holdout:g} of the rows is held out"
            )
        test = examples(config.test)
    else:
        rng.shuffle(train)
        kept = max(1, round(data.holdout * len(train)))
        if kept >= len(train):
            raise DataError(
                f"{config.train}: {len(train)} rows are too few to hold out {data.holdout:g} of "
                "them for the test; name a test file"
            )
        test, train = train[:kept], train[kept:]
    return Task(
        config.name,
        _draw(train, data.train_rows, rng),
        _draw(test, data.test_rows, rng),
        config.labels,
        config.measure,
    )


def _draw(examples: list[Example], at_most: int | None, rng: random.Random) -> list[Example]:
    if at_most is None or len(examples) <= at_most:
        return examples
    return rng.sample(examples, at_most)


def _warn_of_shared_rows(tasks: Sequence[Task]) -> None:
    # Where a row is trained on first.
    trained = {
        example: example.where for task in reversed(tasks) for example in reversed(task.train)
    }
    for task in tasks:
        shared = [example for example in task.test if example in trained]
        if shared:
            warnings.warn(
                f"{len(shared)} of {len(task.test)} test rows of task {task.name!r} are training "
                f"rows too; the first: {shared[0].where}, which is {trained[shared[0]]}",
                SculptWarning,
                stacklevel=3,
            )
