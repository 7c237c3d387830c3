"""From what a run says about its data to its tasks."""

from __future__ import annotations

import random
from pathlib import Path

from sculpt.data.config import DataConfig, TaskConfig
from sculpt.data.examples import DataError, Example, Task
from sculpt.data.folders import folder_tasks
from sculpt.data.layouts import Asking, examples_of
from sculpt.data.rows import BadRows, read_rows


def read_tasks(data: DataConfig, seed: int, bad: BadRows | None = None) -> list[Task]:
    """All tasks in order; rows are drawn with `seed`.

    `bad` collects the rows that were left out. Raises `DataError` for data that cannot be used.
    """
    if data.builtin == "demo":
        from sculpt.demo.tasks import demo_tasks

        sizes = {"train_per_task": data.train_rows, "test_per_task": data.test_rows}
        return demo_tasks(seed, **{key: value for key, value in sizes.items() if value})
    bad = bad if bad is not None else BadRows(data.skip_bad_rows)
    tasks = data.tasks if data.folder is None else folder_tasks(data.folder, data.order)
    return [_read_task(task, data, seed, bad) for task in tasks]


def _read_task(config: TaskConfig, data: DataConfig, seed: int, bad: BadRows) -> Task:
    asking = Asking(
        config.instruction,
        config.suffix,
        {str(ours): theirs for ours, theirs in config.fields.items()},
    )

    def examples(path: Path) -> list[Example]:
        return examples_of(read_rows(path, bad), asking, config.labels, bad)

    train = examples(config.train)
    rng = random.Random(f"{config.name}/{seed}")
    if config.test is not None:
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
