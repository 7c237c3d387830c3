"""Continual-learning metrics of an accuracy matrix.

Notation: ``a[i][j]`` is the score on task ``j`` after training task ``i``, tasks counted from 0 and
``T`` of them; ``b[j]`` is the score on task ``j`` before any training (the *baseline*).
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


class Metric(NamedTuple):
    """What a figure means: field name of `Summary`, which direction is good, and the formula."""

    name: str
    direction: str
    definition: str

    @property
    def title(self) -> str:
        return self.name.replace("_", " ")


METRICS: tuple[Metric, ...] = (
    Metric("average_accuracy", "higher is better", "mean score over all tasks after the last one"),
    Metric(
        "backward_transfer",
        "higher is better",
        "score after the last task minus score right after learning it, mean over earlier tasks",
    ),
    Metric(
        "forward_transfer",
        "higher is better",
        "score just before learning it minus score before any training, mean over later tasks",
    ),
    Metric(
        "forgetting",
        "lower is better",
        "best score ever minus score after the last task, mean over earlier tasks",
    ),
    Metric(
        "learned_accuracy",
        "higher is better",
        "score right after learning it, mean over all tasks",
    ),
)


@dataclass(frozen=True)
class Summary:
    """The figures of an accuracy matrix, in the unit of the scores that went in.

    NaN says that a figure is not defined for this matrix (a single task, no baseline) or that an
    entry it needs was not evaluated. `METRICS` holds direction and definition of each.
    """

    average_accuracy: float
    backward_transfer: float
    forward_transfer: float
    forgetting: float
    learned_accuracy: float

    def __str__(self) -> str:
        width = max(len(metric.title) for metric in METRICS)
        return "\n".join(
            f"{metric.title:<{width}}  {getattr(self, metric.name):>8.4f}"
            f"  ({metric.direction}: {metric.definition})"
            for metric in METRICS
        )


def summary(matrix: Any, baseline: Any = None) -> Summary:
    """Summarise an accuracy matrix by the usual continual-learning figures.

    With ``T`` tasks, ``L = T - 1`` the last of them::

        average_accuracy   mean over j       of a[L][j]
        backward_transfer  mean over j < L   of a[L][j] - a[j][j]
        forward_transfer   mean over j > 0   of a[j-1][j] - b[j]
        forgetting         mean over j < L   of max_i a[i][j] - a[L][j]
        learned_accuracy   mean over j       of a[j][j]

    An entry that was not evaluated is NaN, and a figure that needs it is NaN too: nothing is
    averaged over what happens to be there. Needed are: for the average accuracy the last row; for
    backward transfer the last row and the diagonal; for forward transfer the entries just above
    the diagonal and the baseline; for forgetting every entry on and below the diagonal (an unseen
    score could have been the best one); for the learned accuracy the diagonal. Scores above it, of
    tasks not trained yet, take part in the best score where they were evaluated, but need not be.
    The last task enters neither backward transfer nor forgetting, the first one not forward
    transfer; so with a single task these three are NaN.

    Args:
        matrix: ``(T, T)`` scores, ``matrix[i][j]`` on task ``j`` after task ``i``, NaN where not
            evaluated. Nested sequences, a NumPy array or a torch tensor; any unit, any scale.
        baseline: ``(T,)`` scores of the model before any training, NaN where not evaluated.
            Without it the forward transfer is NaN.

    Raises:
        ValueError: `matrix` is empty or not square, `baseline` does not fit it, or either holds
            something that is neither a finite number nor NaN.
    """
    a = _numbers("matrix", matrix, "a square (tasks, tasks) matrix of scores")
    if a.ndim != 2 or a.shape[0] != a.shape[1] or a.shape[0] == 0:
        raise ValueError(
            f"matrix has shape {a.shape}; expected a square (tasks, tasks) matrix of scores with "
            "at least one task: matrix[i][j] is the score on task j after task i, NaN where not "
            "evaluated"
        )
    tasks = a.shape[0]
    if baseline is None:
        b = np.full(tasks, np.nan)
    else:
        expected = f"one score for each of the {tasks} tasks, before any training"
        b = _numbers("baseline", baseline, expected)
        if b.shape != (tasks,):
            raise ValueError(f"baseline has shape {b.shape}; expected ({tasks},): {expected}")

    last = a[-1]
    learned = np.diagonal(a)
    above = np.triu(np.ones_like(a, dtype=bool), k=1)
    # Not evaluated before it was trained: no candidate for the best score, and no gap either.
    best = np.where(above & np.isnan(a), -np.inf, a).max(axis=0)
    return Summary(
        average_accuracy=_mean(last),
        backward_transfer=_mean((last - learned)[:-1]),
        forward_transfer=_mean(np.diagonal(a, offset=1) - b[1:]),
        forgetting=_mean((best - last)[:-1]),
        learned_accuracy=_mean(learned),
    )


def _mean(values: Matrix) -> float:
    return float(values.mean()) if values.size else float("nan")


def _numbers(name: str, value: Any, expected: str) -> Matrix:
    """`value` as float64, NaN where it says so; anything that is not a number is an error."""
    shown = reprlib.repr(value)
    try:
        array = np.asarray(_plain(value))
    except ValueError as error:
        raise ValueError(
            f"{name} is {shown}, whose rows differ in length; expected {expected}"
        ) from error
    if array.size and array.dtype.kind not in "iuf":
        raise ValueError(
            f"{name} is {shown}, which holds something that is not a number; "
            f"expected {expected}, float('nan') where not evaluated"
        )
    numbers = array.astype(np.float64)
    if np.isinf(numbers).any():
        where = ", ".join(str(int(i)) for i in np.argwhere(np.isinf(numbers))[0])
        raise ValueError(
            f"{name}[{where}] is {numbers[np.isinf(numbers)][0]}; expected finite scores, "
            "float('nan') where not evaluated"
        )
    return numbers


def _plain(value: Any) -> Any:
    """Tensors, also inside lists, as plain Python numbers; booleans as objects, to be refused."""
    if callable(getattr(value, "tolist", None)):  # torch tensors (any device, bf16), NumPy arrays
        value = value.tolist()
    if isinstance(value, bool):
        return None
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    return value
