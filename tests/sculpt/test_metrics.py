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
MATRIX = [[0.8, 0.2, 0.4], [0.6, 0.6, 0.3], [0.5, 0.7, 0.9]]
BASELINE = [0.0, 0.1, 0.25]


def figures(result: Summary) -> list[float]:
    return [getattr(result, metric.name) for metric in METRICS]


def test_three_tasks_by_hand() -> None:
    result = summary(MATRIX, BASELINE)
    assert result.average_accuracy == pytest.approx(0.7)
    assert result.backward_transfer == pytest.approx(-0.1)
    assert result.forward_transfer == pytest.approx(0.075)
    assert result.forgetting == pytest.approx(0.15)


def test_best_score_before_the_last_task_counts_wherever_it_was_reached() -> None:
    # Task 0 peaks after task 1 (0.9), task 1 was best before it was even trained (0.8):
    # ((0.9 - 0.4) + (0.8 - 0.5)) / 2 = 0.4, while backward transfer sees only the diagonal:
    # ((0.4 - 0.6) + (0.5 - 0.7)) / 2 = -0.2.
    result = summary([[0.6, 0.8, 0.0], [0.9, 0.7, 0.0], [0.4, 0.5, 1.0]])
    assert result.forgetting == pytest.approx(0.4)
    assert result.backward_transfer == pytest.approx(-0.2)


def test_two_tasks_in_percent() -> None:
    result = summary([[90, 10], [30, 80]], [5, 4])
    assert figures(result) == pytest.approx([55.0, -60.0, 6.0, 60.0])


def test_single_task_has_an_accuracy_and_nothing_to_transfer() -> None:
    result = summary([[0.5]], [0.1])
    assert result.average_accuracy == 0.5
    assert math.isnan(result.backward_transfer)
    assert math.isnan(result.forward_transfer)
    assert math.isnan(result.forgetting)


def test_without_a_baseline_only_the_forward_transfer_is_unknown() -> None:
    result = summary(MATRIX)
    assert math.isnan(result.forward_transfer)
    assert figures(result)[:2] == pytest.approx([0.7, -0.1])
    assert result.forgetting == pytest.approx(0.15)


def test_lower_triangular_matrix_is_the_usual_case() -> None:
    result = summary([[0.8, NAN, NAN], [0.6, 0.6, NAN], [0.5, 0.7, 0.9]], BASELINE)
    assert result.average_accuracy == pytest.approx(0.7)
    assert result.backward_transfer == pytest.approx(-0.1)
    assert result.forgetting == pytest.approx(0.15)
    assert math.isnan(result.forward_transfer)


# Which figures need which entry: A(verage), B(ackward), F(orward), O (forgetting).
NEEDED = {
    (0, 0): "BO", (0, 1): "F", (0, 2): "",
    (1, 0): "O", (1, 1): "BO", (1, 2): "F",
    (2, 0): "ABO", (2, 1): "ABO", (2, 2): "A",
}  # fmt: skip


@pytest.mark.parametrize(("entry", "needed"), NEEDED.items())
def test_a_missing_entry_is_nan_exactly_where_it_is_needed(
    entry: tuple[int, int], needed: str
) -> None:
    matrix = np.array(MATRIX)
    matrix[entry] = NAN
    unknown = {k for k, v in zip("ABFO", figures(summary(matrix, BASELINE)), strict=True) if v != v}
    assert unknown == set(needed)


@pytest.mark.parametrize(("task", "unknown"), [(0, False), (1, True), (2, True)])
def test_missing_baseline_entries(task: int, unknown: bool) -> None:
    baseline = list(BASELINE)
    baseline[task] = NAN
    result = summary(MATRIX, baseline)
    assert math.isnan(result.forward_transfer) is unknown
    assert not any(math.isnan(v) for k, v in vars(result).items() if k != "forward_transfer")


@pytest.mark.parametrize(
    "matrix",
    [
        tuple(tuple(row) for row in MATRIX),
        np.array(MATRIX),
        np.array(MATRIX, order="F")[::1],
        torch.tensor(MATRIX, dtype=torch.float64, requires_grad=True),
        [torch.tensor(row, dtype=torch.float64) for row in MATRIX],
        [[np.float64(v) for v in row] for row in MATRIX],
        np.ma.masked_invalid(np.array(MATRIX)),
    ],
)
def test_accepts_what_holds_numbers(matrix: object) -> None:
    assert figures(summary(matrix, BASELINE)) == figures(summary(MATRIX, BASELINE))


def test_low_precision_tensors_and_integers() -> None:
    assert summary(torch.tensor([[1.0, 0.0], [0.5, 1.0]], dtype=torch.bfloat16)).forgetting == 0.5
    assert summary(torch.tensor([[4, 0], [1, 3]])).average_accuracy == 2.0


def test_masked_entries_are_missing_not_their_hidden_value() -> None:
    masked = np.ma.masked_equal(np.array(MATRIX), -1.0)
    masked[2, 0] = np.ma.masked
    assert math.isnan(summary(masked).average_accuracy)


def test_input_is_left_alone() -> None:
    matrix = np.array(MATRIX)
    summary(matrix, BASELINE)
    assert matrix.tolist() == MATRIX


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        ([], r"matrix has shape \(0,\); expected a square"),
        ([[]], r"matrix has shape \(1, 0\); expected a square"),
        (0.5, r"matrix has shape \(\); expected a square"),
        ([0.5, 0.5], r"matrix has shape \(2,\); expected a square"),
        ([[1, 2]], r"matrix has shape \(1, 2\); expected a square"),
        ([[1, 2], [3]], r"matrix is \[\[1, 2\], \[3\]\], whose rows differ in length"),
        ([["0.5"]], r"matrix is \[\['0.5'\]\].*not a number"),
        ([[0.5, "x"], [1, 2]], r"matrix is .*'x'.*not a number"),
        ([[None]], r"matrix is \[\[None\]\].*not a number.*float\('nan'\)"),
        ([[True]], r"matrix is \[\[True\]\].*not a number"),
        ([[1j]], r"matrix is \[\[1j\]\].*not a number"),
        (None, r"matrix is None.*not a number"),
        ({"a": 1}, r"matrix is \{'a': 1\}.*not a number"),
        ([[0.1, 0.2], [math.inf, 0.3]], r"matrix\[1, 0\] is inf; expected finite"),
        ([[-math.inf]], r"matrix\[0, 0\] is -inf; expected finite"),
    ],
)
def test_bad_matrices_say_what_was_wrong(matrix: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        summary(matrix)


@pytest.mark.parametrize(
    ("baseline", "said"),
    [
        ([0.1, 0.2], r"baseline has shape \(2,\); expected \(3,\)"),
        ([[0.1, 0.2, 0.3]], r"baseline has shape \(1, 3\); expected \(3,\)"),
        (0.1, r"baseline has shape \(\); expected \(3,\)"),
        ([0.1, "x", 0.3], r"baseline is .*not a number"),
        ([0.1, math.inf, 0.3], r"baseline\[1\] is inf; expected finite"),
    ],
)
def test_bad_baselines_say_what_was_wrong(baseline: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        summary(MATRIX, baseline)


def test_text_shows_value_direction_and_definition() -> None:
    lines = str(summary(MATRIX)).splitlines()
    assert len(lines) == 4
    for line, metric, value in zip(
        lines, METRICS, ["0.7000", "-0.1000", "nan", "0.1500"], strict=True
    ):
        assert line.startswith(metric.title)
        assert value in line
        assert metric.direction in line
        assert metric.definition in line


def test_summary_is_frozen() -> None:
    with pytest.raises(AttributeError):
        summary(MATRIX).forgetting = 0.0  # type: ignore[misc]


square = st.integers(1, 6).flatmap(
    lambda n: hnp.arrays(np.float64, (n, n), elements=st.floats(-100, 100))
)


@given(square)
def test_forgetting_is_never_negative_and_at_least_the_loss_since_learning(
    matrix: np.ndarray,
) -> None:
    result = summary(matrix)
    if len(matrix) > 1:
        assert result.forgetting >= 0
        assert result.forgetting >= -result.backward_transfer - 1e-9


@given(square, st.floats(-10, 10), st.floats(0.125, 8))
def test_shifting_and_scaling_the_scores(matrix: np.ndarray, shift: float, scale: float) -> None:
    baseline = matrix.mean(axis=0)
    before = figures(summary(matrix, baseline))
    after = figures(summary(matrix * scale + shift, baseline * scale + shift))
    expected = [before[0] * scale + shift, *(value * scale for value in before[1:])]
    assert after == pytest.approx(expected, abs=1e-9, nan_ok=True)


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
        assert figures(result)[1:] == pytest.approx([backward, forward, forgot], abs=1e-9)


@given(square, st.data())
def test_a_gap_never_changes_a_figure_it_only_hides_it(
    matrix: np.ndarray, data: st.DataObject
) -> None:
    entry = data.draw(st.tuples(*[st.integers(0, len(matrix) - 1)] * 2))
    holed = matrix.copy()
    holed[entry] = NAN
    whole, gap = summary(matrix, matrix[0]), summary(holed, matrix[0])
    for metric in METRICS:
        value = getattr(gap, metric.name)
        # Above the diagonal a score is an optional candidate for the best one.
        if metric.name == "forgetting" and entry[0] < entry[1]:
            assert not value > whole.forgetting + 1e-9
        else:
            assert math.isnan(value) or value == getattr(whole, metric.name)
