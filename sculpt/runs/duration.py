"""How long a run will take, from one measurement of each thing that it does."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from sculpt.certificate.leak import measure
from sculpt.config import SculptConfig
from sculpt.runs.config import RunConfig
from sculpt.runs.prepare import Prepared
from sculpt.task.targets import Target
from sculpt_kernels import split


@dataclass(frozen=True)
class Duration:
    """Seconds. step: one, of `rows` rows and `tokens` tokens; the others: of all tasks."""

    step: float
    rows: int
    tokens: int
    training: float
    subspaces: float
    certificates: float
    tests: float
    tested: int

    @property
    def total(self) -> float:
        return self.training + self.subspaces + self.certificates + self.tests


def duration_of(prepared: Prepared) -> Duration:
    """Estimate by one plain step, one matrix of each shape and one batch of tests.

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
    shown = tasks[0].test[: prepared.config.evaluation.batch_size]
    some = replace(tasks[0], test=shown)
    test = seconds_of(lambda: prepared.learner.score(some)) / len(shown)
    tested = sum((len(tasks) - place) * len(task.test) for place, task in enumerate(tasks))
    return Duration(
        one,
        len(batch),
        tokens,
        train * one / tokens,
        len(tasks) * subspaces,
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
