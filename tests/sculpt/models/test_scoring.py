"""Measures of generated answers, against values worked out by hand."""

from __future__ import annotations

import pytest

from sculpt.models.scoring import begins_with, exact_match, measures, rouge_l


@pytest.mark.parametrize(
    ("written", "wanted", "expected"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The cat, sat!", "the cat sat", 1.0),
        # 5 of 6 words in order: precision and recall 5/6.
        ("the cat was on the mat", "the cat sat on the mat", 5 / 6),
        # "a c" of 3 and 4 words.
        ("a b c", "a c d e", 2 * 2 / (3 + 4)),
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("schöne Grüße", "viele schöne Grüße", 4 / 5),
        # Five characters of six and five.
        ("今天天气很好", "今天天气好", 10 / 11),
        ("", "something", 0.0),
        ("nothing", "in common", 0.0),
    ],
)
def test_rouge_l(written: str, wanted: str, expected: float) -> None:
    assert rouge_l(written, wanted) == pytest.approx(expected)
    assert rouge_l(wanted, written) == pytest.approx(expected)


def test_exact_match_ignores_blanks_only() -> None:
    assert exact_match(" very  good\n", "very good") == 1
    assert exact_match("Very good", "very good") == 0
    assert exact_match("very good indeed", "very good") == 0


@pytest.mark.parametrize(
    ("written", "expected"),
    [("B", 1), ("b. the second", 1), (" B)", 1), ("Bad", 0), ("A", 0), ("the B", 0), ("", 0)],
)
def test_a_choice_is_how_the_answer_begins(written: str, expected: int) -> None:
    assert begins_with(written, "B", ("A", "B")) == expected


def test_the_longest_label_that_fits_is_the_choice() -> None:
    labels = ("not entailment", "not")
    assert begins_with("not entailment here", "not entailment", labels) == 1
    assert begins_with("not entailment here", "not", labels) == 0


def test_means_of_all() -> None:
    found = measures(["A", "b"], ["A", "B"], ("A", "B"))
    assert found == {"exact_match": 0.5, "rouge_l": 1.0, "choice": 1.0}
    assert set(measures(["x"], ["x"], ())) == {"exact_match", "rouge_l"}
