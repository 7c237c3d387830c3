"""How long a run will take, from one measurement of each thing that it does."""

from __future__ import annotations

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from sculpt.certificate.leak import measure
from sculpt.config import SculptConfig
from sculpt.curvature.directions import Directions
from sculpt.messages import SculptWarning
from sculpt.runs.config import RunConfig
from sculpt.runs.prepare import Prepared
from sculpt.runs.sculpting import Summed
from sculpt.sculptor import Sculptor
from sculpt.task.targets import Target
from sculpt_kernels import split


@dataclass(frozen=True)
class Duration:
    """Seconds. step: one, of `rows` rows and `tokens` tokens; the others: of all tasks."""

    step: float
    rows: int
    tokens: int
    training: float
    statistics: float
    subspaces: float
    certificates: float
    tests: float
    tested: int

    @property
    def total(self) -> float:
        return self.training + self.statistics + self.subspaces + self.certificates + self.tests


def duration_of(prepared: Prepared) -> Duration:
    """Estimate by one plain step, one batch of statistics, one matrix of each shape and one batch
    of tests.

    Tests: of the model as it is now, which may write longer answers than a trained one.
    """
    training, tasks, targets = prepared.config.training, prepared.tasks, prepared.strategy.targets
    batch = prepared.rows[0][: training.batch_size]
    prepared.learner.model.requires_grad_(False)
    for target in targets:
        target.parameter.requires_grad_(True)

    def step() -> int:
        loss, tokens = prepared.learner.loss(batch)
        torch.autograd.backward(loss)
        loss.item()
        prepared.learner.model.zero_grad(set_to_none=True)
        return tokens

    tokens = step()  # the first one also makes what later ones find
    one = seconds_of(step)
    train = sum(
        prepared.strategy.steps(number)
        * training.batch_size
        * statistics.fmean(len(row.ids) for row in rows)
        for number, rows in enumerate(prepared.rows)
    )
    subspaces, certificates = matrix_seconds(targets, prepared.config)
    one_batch, choice = protect_seconds(prepared)
    begins, ends = protected_tasks(prepared.config, len(tasks))
    passes = [-(-min(prepared.config.calibration_rows, len(rows)) // training.batch_size)
              for rows in prepared.rows]  # fmt: skip
    shown = tasks[0].test[: prepared.config.evaluation.batch_size]
    some = replace(tasks[0], test=shown)
    test = seconds_of(lambda: prepared.learner.score(some)) / len(shown)
    tested = sum((len(tasks) - place) * len(task.test) for place, task in enumerate(tasks))
    return Duration(
        one,
        len(batch),
        tokens,
        train * one / tokens,
        one_batch * (sum(passes[len(tasks) - begins :]) + sum(passes[:ends])),
        (len(tasks) - begins) * subspaces + begins * choice,
        len(tasks) * certificates,
        tested * test,
        tested,
    )


def matrix_seconds(targets: list[Target], config: RunConfig) -> tuple[float, float]:
    """For one task: subspaces of all targets, and their certificates; nothing for other methods."""
    if config.method != "sculpt":
        return 0.0, 0.0
    kinds = Counter((target.shape, target.preserved) for target in targets)
    examples = {(target.shape, target.preserved): target for target in targets}
    subspaces = certificates = 0.0
    for kind, count in kinds.items():
        find, certify = _seconds_of_one(examples[kind], config.sculpt)
        stacked = kind[0][0] if len(kind[0]) == 3 else 1
        subspaces += count * stacked * find
        independent = config.certificate == "independent"
        certificates += count * stacked * (certify + independent * find)
    return subspaces, certificates


def protected_tasks(config: RunConfig, tasks: int) -> tuple[int, int]:
    """How many tasks begin with something protected, the last ones, and how many end with it."""
    if config.method != "sculpt" or config.sculpt.subspaces == "weights":
        return 0, 0
    return tasks - (config.memory is None), tasks - (not config.checkpoint.memory)


def protect_seconds(prepared: Prepared) -> tuple[float, float]:
    """A pass over one batch, and choosing all directions of a task by what it collects."""
    if protected_tasks(prepared.config, 2) == (0, 0):
        return 0.0, 0.0
    config, targets = prepared.config.sculpt, prepared.strategy.targets
    sculptor = Sculptor(prepared.learner.model, config)
    batch = Summed(prepared.learner, prepared.rows[0][: prepared.config.training.batch_size])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SculptWarning)  # One batch is not what is protected.
        passed = seconds_of(lambda: sculptor.protect([batch]))
    directions = Directions(sculptor.memory, sculptor.memory)
    kinds = Counter((target.shape, target.trainable_rank) for target in targets)
    examples = {(t.shape, t.trainable_rank): t.name for t in targets if directions.has(t.name)}
    choice = sum(
        kinds[kind] * seconds_of(lambda kind=kind: directions.trainable(examples[kind], kind[1]))  # type: ignore[misc]
        for kind in examples
    )
    return passed, choice


def _seconds_of_one(target: Target, config: SculptConfig) -> tuple[float, float]:
    weight = target.oriented(target.parameter.detach())
    weight = weight[0] if weight.ndim == 3 else weight
    part = "low" if config.chosen_engine == "compact" else "high"
    start = time.perf_counter()
    found = split(weight.double(), rank=target.preserved, part=part)
    find = time.perf_counter() - start
    if config.coordinates == "full" and weight.shape[0] != weight.shape[1]:
        find *= 2
    sides = (found.U, part == "high"), (found.V, part == "high")
    certify = seconds_of(lambda: measure("", weight, weight * 1.001, *sides))
    return find, certify


def seconds_of(work: Callable[[], object]) -> float:
    """Wall clock of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
