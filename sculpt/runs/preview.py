"""What a run is about to do: data, ranks, memory and time, before anything is spent on it.

Nothing is written. For the time, the model is loaded and each thing is done once; see
`sculpt.runs.duration`.
"""

from __future__ import annotations

import statistics
from collections import Counter

from sculpt.data.examples import Example
from sculpt.messages import text_table
from sculpt.runs.config import RunConfig
from sculpt.runs.duration import Duration, duration_of
from sculpt.runs.method import Strategy
from sculpt.runs.prepare import Prepared
from sculpt.runs.space import DiskUse, MemoryUse, free_disk, space_of


def preview(prepared: Prepared) -> str:
    """Everything as text."""
    config = prepared.config
    memory, disk = space_of(prepared.strategy)
    return "\n\n".join(
        (
            _paths(config),
            _data(prepared),
            _ranks(prepared.strategy),
            _space(memory, disk, free_disk(config.out)),
            _time(duration_of(prepared)),
        )
    )


def _paths(config: RunConfig) -> str:
    """What was made of the paths: all of them, as the run will use them."""
    rows = [("model", config.model), ("out", config.out), ("data", config.data.folder)]
    for task in config.data.tasks:
        rows += [(f"{task.name}: train", task.train), (f"{task.name}: test", task.test)]
    return "\n".join(["Paths", *(f"  {name}: {path}" for name, path in rows if path is not None)])


def _data(prepared: Prepared) -> str:
    rows = []
    parts = zip(prepared.tasks, prepared.rows, prepared.cut, strict=True)
    for number, (task, encoded, cut) in enumerate(parts):
        lengths = [len(row.ids) for row in encoded]
        rows.append(
            (
                task.name,
                _kind(task.train[0]),
                f"{len(task.train):,}",
                f"{len(task.test):,}",
                str(len(task.labels) or "free"),
                f"{statistics.fmean(lengths):.0f} / {max(lengths)}",
                f"{cut:,}",
                f"{prepared.strategy.steps(number):,}",
            )
        )
    header = ("task", "rows", "train", "test", "labels", "tokens mean / max", "cut", "steps")
    notes = [f"{len(prepared.bad.found)} rows left out", *prepared.bad.found]
    return "Data\n" + text_table(header, rows, note="\n".join(notes if prepared.bad.found else []))


def _kind(example: Example) -> str:
    if example.messages:
        return "chat"
    return "document" if example.is_document else "question, answer"


def _ranks(strategy: Strategy) -> str:
    ours = strategy.config.method == "sculpt"
    kinds = Counter(
        (
            target.name.rpartition(".")[2],
            target.shape,
            *((target.preserved, target.trainable_rank) if ours else ()),
            strategy.cost(target).trainable,
        )
        for target in strategy.targets
    )
    rows = [
        (name, str(count), " x ".join(map(str, shape)), *map(str, ranks), f"{count * elements:,}")
        for (name, shape, *ranks, elements), count in kinds.items()
    ]
    ranks = ("preserved", "trainable") if ours else ()
    header = ("matrices", "count", "shape", *ranks, "values that train")
    title = f"Ranks, method {strategy.config.method}\n"
    if ours and strategy.config.sculpt.ranks is not None:
        title = "Ranks, method sculpt, of layers of mean importance: others adapt\n"
    return title + text_table(header, rows)


def _space(memory: MemoryUse, disk: DiskUse, free: int) -> str:
    rows = (
        ("weights", memory.weights),
        ("what stays in a task: weights before it, bases, sums", memory.fixed),
        ("trained values, gradients, moments", memory.trained),
        ("together, without activations", memory.total),
        ("disk: checkpoints while it runs, at most", disk.checkpoints),
        ("disk: models", disk.models),
        ("disk: free now", free),
    )
    shown = [(name, _megabytes(size)) for name, size in rows]
    note = "" if free >= disk.total else "The disk has NOT enough room: the run will not begin."
    return "Memory and disk (estimate)\n" + text_table(("part", "size"), shown, note=note)


def _time(took: Duration) -> str:
    step = f"one step of {took.rows} rows, {took.tokens} tokens, measured once, plain"
    rows = (
        (step, took.step),
        ("training, all tasks", took.training),
        ("statistics of what tasks use, all tasks", took.statistics),
        ("subspaces, all tasks", took.subspaces),
        ("certificates, all tasks", took.certificates),
        (f"tests, {took.tested:,} rows", took.tests),
        ("together", took.total),
    )
    note = (
        "From one step, one batch of statistics, one matrix of each shape, and one batch of tests "
        "as the model is now."
    )
    shown = [(name, _minutes(seconds)) for name, seconds in rows]
    return "Time (estimate)\n" + text_table(("part", "time"), shown, note=note)


def _megabytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _minutes(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 120 else f"{seconds / 60:,.0f} min"
