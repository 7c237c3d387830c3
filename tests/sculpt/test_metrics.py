"""Accuracy-matrix metrics: values worked out by hand, and what must hold for every matrix."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sculpt.metrics import METRICS, Summary, summary

NAN = float("nan")

# Three tasks. Worked out on paper:
#   average accuracy   (0.5 + 0.7 + 0.9) / 3                 = 0.7
#   backward transfer  ((0.5 - 0.8) + (0.7 - 0.6)) / 2       = -0.1
#   forward transfer   ((0.2 - 0.1) + (0.3 - 0.25)) / 2      = 0.075
#   forgetting         ((0.8 - 0.5) + (0.7 - 0.7)) / 2       = 0.15
#   learned accuracy   (0.8 + 0.6 + 0.9) / 3                 = 0.7667
MATRIX = [[0.8, 0.2, 0.4], [0.6, 0.6, 0.3], [0.5, 0.7, 0.9]]
BASELINE = [0.0, 0.1, 0.25]


def figures(result: Summary) -> list[float]:
    return [getattr(result, metric.name) for metric in METRICS]


def test_three_tasks_by_hand() -> None:
    assert figures(summary(MATRIX, BASELINE)) == pytest.approx([0.7, -0.1, 0.075, 0.15, 2.3 / 3])
    assert figures(summary(MATRIX)) == pytest.approx([0.7, -0.1, NAN, 0.15, 2.3 / 3], nan_ok=True)
    alone = [0.5, NAN, NAN, NAN, 0.5]
    assert figures(summary([[0.5]], [0.1])) == pytest.approx(alone, nan_ok=True)


# Which figures need which entry: A(verage), B(ackward), F(orward), O (forgetting), L(earned).
NEEDED = {
    (0, 0): "BOL", (0, 1): "F", (0, 2): "",
    (1, 0): "O", (1, 1): "BOL", (1, 2): "F",
    (2, 0): "ABO", (2, 1): "ABO", (2, 2): "AL",
}  # fmt: skip


@pytest.mark.parametrize(("entry", "needed"), NEEDED.items())
def test_a_missing_entry_is_nan_exactly_where_it_is_needed(
    entry: tuple[int, int], needed: str
) -> None:
    matrix = np.array(MATRIX)
    matrix[entry] = NAN
    values = figures(summary(matrix, BASELINE))
    assert {k for k, v in zip("ABFOL", values, strict=True) if math.isnan(v)} == set(needed)


def test_a_missing_baseline_is_needed_for_later_tasks_alone() -> None:
    for task, unknown in enumerate((False, True, True)):
        baseline = [NAN if j == task else b for j, b in enumerate(BASELINE)]
        values = figures(summary(MATRIX, baseline))
        assert [math.isnan(v) for v in values] == [False, False, unknown, False, False]


@pytest.mark.parametrize(
    "matrix",
    [
        tuple(tuple(row) for row in MATRIX),
        np.array(MATRIX),
        torch.tensor(MATRIX, dtype=torch.float64, requires_grad=True),
        [torch.tensor(row, dtype=torch.float64) for row in MATRIX],
    ],
)
def test_accepts_what_holds_numbers(matrix: object) -> None:
    assert figures(summary(matrix, BASELINE)) == figures(summary(MATRIX, BASELINE))


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        ([], r"matrix has shape \(0,\); expected a square"),
        ([[1, 2]], r"matrix has shape \(1, 2\); expected a square"),
        ([[1, 2], [3]], r"matrix is \[\[1, 2\], \[3\]\], whose rows differ in length"),
        ([[0.5, "x"], [1, 2]], r"matrix is .*'x'.*not a number"),
        ([[None]], r"matrix is \[\[None\]\].*not a number.*float\('nan'\)"),
        ([[True]], r"matrix is \[\[True\]\].*not a number"),
        ([[0.1, 0.2], [math.inf, 0.3]], r"matrix\[1, 0\] is inf; expected finite"),
    ],
)
def test_bad_matrices_say_what_was_wrong(matrix: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        summary(matrix)


@pytest.mark.parametrize(
    ("baseline", "said"),
    [
        ([0.1, 0.2], r"baseline has shape \(2,\); expected \(3,\)"),
        ([0.1, math.inf, 0.3], r"baseline\[1\] is inf; expected finite"),
    ],
)
def test_bad_baselines_say_what_was_wrong(baseline: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        summary(MATRIX, baseline)


def test_text_shows_value_direction_and_definition() -> None:
    lines = str(summary(MATRIX)).splitlines()
    assert len(lines) == 5
    for line, metric, value in zip(
        lines, METRICS, ["0.7000", "-0.1000", "nan", "0.1500", "0.7667"], strict=True
    ):
        assert line.startswith(metric.title)
        assert value in line
        assert metric.direction in line
        assert metric.definition in line


square = st.integers(1, 6).flatmap(
    lambda n: hnp.arrays(np.float64, (n, n), elements=st.floats(-100, 100))
)


@given(square)
def test_definitions_entry_by_entry(matrix: np.ndarray) -> None:
    tasks, last = len(matrix), len(matrix) - 1
    baseline = matrix[:, 0]
    result = summary(matrix, baseline)
    assert result.average_accuracy == pytest.approx(sum(matrix[last]) / tasks, abs=1e-9)
    if tasks > 1:
        backward = sum(matrix[last, j] - matrix[j, j] for j in range(last)) / last
        forward = sum(matrix[j - 1, j] - baseline[j] for j in range(1, tasks)) / last
        forgot = sum(max(matrix[:, j]) - matrix[last, j] for j in range(last)) / last
        learned = sum(matrix[j, j] for j in range(tasks)) / tasks
        assert figures(result)[1:] == pytest.approx([backward, forward, forgot, learned], abs=1e-9)
