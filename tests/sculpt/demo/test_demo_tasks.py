"""The three real tasks: what is read, how it is split."""

from __future__ import annotations

from collections import Counter

import pytest

from sculpt.data.examples import Example, Task
from sculpt.demo.tasks import _signature, balanced_task, demo_tasks


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return demo_tasks(0)


def test_tasks_are_balanced_and_share_no_text(tasks: list[Task]) -> None:
    assert [task.name for task in tasks] == ["BBC topic", "tweet sentiment", "movie verdict"]
    assert [len(task.labels) for task in tasks] == [5, 3, 2]
    for task in tasks:
        for split in (task.train, task.test):
            assert len(set(Counter(e.answer for e in split).values())) == 1
            assert {e.answer for e in split} == set(task.labels)
        texts = [_signature(e.text) for e in (*task.train, *task.test)]
        assert len(texts) == len(set(texts))
    assert len({label for task in tasks for label in task.labels}) == 10


def test_encodings_are_right(tasks: list[Task]) -> None:
    text = " ".join(e.text for task in tasks for e in (*task.train, *task.test))
    assert "£" in text, "the one Latin-1 file among the articles, and the UTF-8 ones, have pounds"
    assert "\ufffd" not in text.replace("_\ufffd", "")
    assert "Â£" not in text


def test_splits_depend_on_the_seed_only() -> None:
    again, other = demo_tasks(0, test_per_task=60), demo_tasks(1, test_per_task=60)
    assert again == demo_tasks(0, test_per_task=60)
    assert all(a.test != b.test for a, b in zip(again, other, strict=True))


def test_the_same_text_in_other_clothes_is_left_out() -> None:
    examples = [
        Example("Great flight with @air today! http://x.y/z", "a"),
        Example("RT @bob great FLIGHT with @other today", "a"),
        Example("@someone http://only.a/link", "a"),
        Example("another one", "a"),
        Example("first of b", "b"),
        Example("second of b", "b"),
    ]
    task = balanced_task("t", ":", ("a", "b"), examples, 0, 2, 2)
    texts = {e.text for e in (*task.train, *task.test)}
    assert len(texts) == 4
    assert len(texts & {examples[0].text, examples[1].text}) == 1
    assert texts > {examples[i].text for i in (3, 4, 5)}


def test_too_few_texts_are_an_error() -> None:
    examples = [Example("one", "a"), Example("two", "a"), Example("three", "b")]
    with pytest.raises(ValueError, match="'t' has 1 distinct texts labelled 'b'"):
        balanced_task("t", ":", ("a", "b"), examples, 0, 2, 2)
    with pytest.raises(ValueError, match="train_per_task=1"):
        balanced_task("t", ":", ("a", "b"), examples, 0, 1, 2)
