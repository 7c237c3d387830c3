"""The task sequence: train one task after another, and score all tasks seen after each."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from sculpt.certificate import Certificate, LeakRow
from sculpt.learner import Learner
from sculpt.memory import optimizer_state_bytes, peak_memory_bytes, reset_peak_memory
from sculpt.strategies import Strategy
from sculpt.text_tasks import Task, batches

NAN = float("nan")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where and what to try."""


@dataclass(frozen=True)
class Schedule:
    """Length and pace of every task.

    steps: optimizer steps for each task; batch_size: examples in a step.
    lr: learning rate of AdamW on dense weights, rising over `warmup_steps`, then constant.
    seed: of the data order, which depends on nothing else.
    """

    steps: int
    batch_size: int
    lr: float
    warmup_steps: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, expected at least 1")
        if not 0.0 < self.lr < math.inf:
            raise ValueError(f"lr={self.lr}, expected a positive number")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps}, expected 0 to steps={self.steps}")

    def factor(self, step: int) -> float:
        """Share of `lr` in step `step`, counted from 1."""
        return min(1.0, step / (self.warmup_steps + 1))


@dataclass(frozen=True)
class Progress:
    """Where a method is: `done` of `total` units of `phase` in task `task`.

    phase: "subspaces", "train", "certify" or "evaluate". `loss` and `tokens_per_second` are those
    of a training step; `accuracy` (generated answers) is that on task `scored`, after `task`.
    """

    method: str
    task: str
    phase: str
    done: int
    total: int
    loss: float = NAN
    tokens_per_second: float = NAN
    scored: str = ""
    accuracy: float = NAN


Report = Callable[[Progress], None]


@dataclass
class MethodResult:
    """Everything measured while one method trained the sequence.

    generated, among_labels: `[i][j]` is the accuracy on task `j` after task `i`, NaN for `j > i`.
    losses: `[task][step]`. step_seconds: median over all steps: forward, backward, optimizer.
    seconds: wall clock of the phases "subspaces", "train", "certify", "evaluate".
    peak_memory_bytes: of the whole process from the first task on, weights included.
    optimizer_state_bytes, trainable_elements: the largest over the tasks.
    """

    method: str
    generated: list[list[float]] = field(default_factory=list)
    among_labels: list[list[float]] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    step_seconds: float = NAN
    tokens: int = 0
    peak_memory_bytes: int = 0
    optimizer_state_bytes: int = 0
    trainable_elements: int = 0
    certificates: list[Certificate] = field(default_factory=list)

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def worst_leak(self) -> LeakRow | None:
        """The matrix nearest to its limit over all tasks, or None where nothing was certified."""
        rows = [certificate.worst for certificate in self.certificates]
        return max(rows, key=lambda row: row.leak / row.limit, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values["total_seconds"] = self.total_seconds
        values["certificates"] = [certificate.to_dict() for certificate in self.certificates]
        return values


class _Clock:
    """Adds the seconds of a `with` block to one phase."""

    def __init__(self, seconds: dict[str, float], phase: str) -> None:
        self._seconds, self._phase = seconds, phase

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self._start
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + spent


def train_sequence(
    learner: Learner,
    tasks: Sequence[Task],
    strategy: Strategy,
    schedule: Schedule,
    report: Report = lambda progress: None,
) -> MethodResult:
    """Train `tasks` in order and score each task seen so far after each.

    The model is trained in place and is a plain one when this returns. Raises `TrainingError` when
    a loss is not finite.
    """
    result = MethodResult(strategy.name)
    durations: list[float] = []
    torch.manual_seed(schedule.seed)
    reset_peak_memory()
    for index, task in enumerate(tasks):

        def tell(phase: str, done: int, total: int, name: str = task.name, **more: Any) -> None:
            report(Progress(strategy.name, name, phase, done, total, **more))

        with _Clock(result.seconds, "subspaces"):
            begun = strategy.begin_task(
                task.name, schedule.lr, lambda done, total: tell("subspaces", done, total)
            )
        full_rates = [group["lr"] for group in begun.optimizer.param_groups]
        order = torch.Generator().manual_seed(1000 * schedule.seed + index)
        data = batches(task.train, schedule.batch_size, order)
        losses: list[float] = []
        with _Clock(result.seconds, "train"):
            for step in range(1, schedule.steps + 1):
                start = time.perf_counter()
                for group, rate in zip(begun.optimizer.param_groups, full_rates, strict=True):
                    group["lr"] = rate * schedule.factor(step)
                loss, tokens = learner.loss(next(data), task)
                torch.autograd.backward(loss)
                begun.optimizer.step()
                begun.optimizer.zero_grad(set_to_none=True)
                losses.append(loss.item())
                durations.append(time.perf_counter() - start)
                result.tokens += tokens
                if not math.isfinite(losses[-1]):
                    raise TrainingError(
                        f"the loss of {strategy.name} is {losses[-1]} in step {step} of "
                        f"{task.name!r}: try an lr below {schedule.lr:g}"
                    )
                tell(
                    "train",
                    step,
                    schedule.steps,
                    loss=losses[-1],
                    tokens_per_second=tokens / durations[-1],
                )
        result.losses.append(losses)
        result.trainable_elements = max(result.trainable_elements, begun.trainable_elements)
        held = optimizer_state_bytes(begun.optimizer)
        result.optimizer_state_bytes = max(result.optimizer_state_bytes, held)
        # The moments of this task must not be alive beside those of the next.
        del begun

        with _Clock(result.seconds, "certify"):
            certificate = strategy.certify(lambda done, total: tell("certify", done, total))
            strategy.end_task()
        if certificate is not None:
            result.certificates.append(certificate)

        generated, among = [NAN] * len(tasks), [NAN] * len(tasks)
        with _Clock(result.seconds, "evaluate"):
            for seen in range(index + 1):
                score = learner.score(tasks[seen])
                generated[seen], among[seen] = score.generated, score.among_labels
                tell(
                    "evaluate",
                    seen + 1,
                    index + 1,
                    scored=tasks[seen].name,
                    accuracy=score.generated,
                )
        result.generated.append(generated)
        result.among_labels.append(among)
    result.step_seconds = statistics.median(durations)
    result.peak_memory_bytes = peak_memory_bytes()
    return result
