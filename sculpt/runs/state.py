"""What a run knows of itself: where it is and what it has measured. All of it is in `RunState`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from sculpt.certificate.leak import Certificate, LeakRow

NAN = float("nan")

PHASES = ("begin", "train", "certify", "evaluate", "finish", "done")
"""In a task: choose subspaces, train, certify and fold, test all tasks seen; at last: finish."""


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

    generated, among_labels: `[i][j]` is the score on task `j` after task `i`, NaN for `j > i`; see
        `sculpt.models.learner.Score`. more: the same for further measures, by name.
    subspaces: `[task][matrix]`: what was chosen, the fields of `sculpt.task.table.TaskRow`.
    losses: `[task][step]`. step_seconds: median over all steps: forward, backward, optimizer.
    seconds: wall clock of the phases "subspaces", "train", "certify", "evaluate" and "save".
    peak_memory_bytes: of the whole process from the first task on, weights included.
    optimizer_state_bytes, trainable_elements: the largest over the tasks.
    general_scores: by name, of what no task is about, "before" the first and "after" the last task.
    held_bytes: what the method keeps for the trained matrices beside weights, trained values, their
        gradients and the optimizer's state: bases, originals, what earlier tasks use, Fisher,
        earlier adapters.
    """

    method: str
    generated: list[list[float]] = field(default_factory=list)
    among_labels: list[list[float]] = field(default_factory=list)
    more: dict[str, list[list[float]]] = field(default_factory=dict)
    subspaces: list[list[dict[str, Any]]] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    step_seconds: float = NAN
    tokens: int = 0
    peak_memory_bytes: int = 0
    optimizer_state_bytes: int = 0
    trainable_elements: int = 0
    held_bytes: int = 0
    certificates: list[Certificate] = field(default_factory=list)
    general_scores: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def worst_leak(self) -> LeakRow | None:
        """The matrix nearest to its limit over all tasks, or None where nothing was certified."""
        rows = [certificate.worst for certificate in self.certificates]
        return max(rows, key=lambda row: row.leak / row.limit, default=None)

    @property
    def general(self) -> dict[str, str]:
        """General scores before and after, e.g. `{"piqa acc": "0.780 → 0.752"}`."""
        scores = self.general_scores
        before, after = scores.get("before", {}), scores.get("after", {})
        return {name: f"{before[name]:.3f} → {after[name]:.3f}" for name in before if name in after}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values["total_seconds"] = self.total_seconds
        values["certificates"] = [certificate.to_dict() for certificate in self.certificates]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MethodResult:
        """The inverse of `to_dict`, through JSON, where NaN is null."""
        known = {item.name for item in fields(cls)}
        if "lm_eval" in values:  # as an earlier version wrote it
            values = {"general_scores": values["lm_eval"], **values}
        result = cls(**{key: _numbers(item) for key, item in values.items() if key in known})
        result.certificates = [Certificate.from_dict(item) for item in values["certificates"]]
        return result


@dataclass
class RunState:
    """Where a run is. It changes in `sculpt.runs.loop` only, and a checkpoint holds all of it.

    task: index of the current task. phase: one of `PHASES`. step: optimizer steps done in it.
    durations: seconds of all steps so far.
    """

    result: MethodResult
    task: int = 0
    phase: str = "begin"
    step: int = 0
    durations: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "result": self.result.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunState:
        return cls(**{**values, "result": MethodResult.from_dict(values["result"])})


def _numbers(value: Any) -> Any:
    if value is None:
        return NAN
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    return value
