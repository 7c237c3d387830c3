"""Folders of data sets: CL_Benchmark, TRACE, or a `train.json` and `test.json` for each data set.

A data set is a folder with a training file. CL_Benchmark keeps them one level down, under the kind
of task (`TC/agnews`), and its rows are bare sentences; the kind gives the instruction.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from sculpt.data.config import TaskConfig
from sculpt.data.examples import DataError
from sculpt.data.rows import FILES

ORDERS: dict[str, tuple[str, ...]] = {
    "1": ("dbpedia", "amazon", "yahoo", "ag"),
    "2": ("dbpedia", "amazon", "ag", "yahoo"),
    "3": ("yahoo", "amazon", "ag", "dbpedia"),
    "4": (
        *("mnli", "cb", "wic", "copa", "qqp", "boolqa", "rte", "imdb", "yelp", "amazon"),
        *("sst-2", "dbpedia", "ag", "multirc", "yahoo"),
    ),
    "5": (
        *("multirc", "boolqa", "wic", "mnli", "cb", "copa", "qqp", "rte", "imdb", "sst-2"),
        *("dbpedia", "ag", "yelp", "amazon", "yahoo"),
    ),
    "6": (
        *("yelp", "amazon", "mnli", "cb", "copa", "qqp", "rte", "imdb", "sst-2", "dbpedia"),
        *("ag", "yahoo", "multirc", "boolqa", "wic"),
    ),
    "trace": (
        *("C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "NumGLUE-cm", "NumGLUE-ds"),
        "20Minuten",
    ),
}
"""Task orders 1 to 6 of the continual-learning benchmark, and that of TRACE."""

ALIASES = {"ag": ("agnews",), "boolqa": ("boolq",), "sst2": ("sst",)}
TRAIN, TEST = ("train",), ("test", "dev", "eval")

INSTRUCTIONS = {
    "TC": "What is the topic of the following paragraph? Choose one from the option.",
    "SC": "What is the sentiment of the following paragraph? Choose one from the option.",
    "NLI": 'What is the logical relationship between the "sentence 1" and the "sentence 2"? '
    "Choose one from the option.",
    "QQP": 'Whether the "first sentence" and the "second sentence" have the same meaning? '
    "Choose one from the option.",
    "WiC": "Given a word and two sentences, whether the word is used with the same sense in both "
    "sentence? Choose one from the option.",
    "COPA": "Choose the right sentence. Choose one from the option.",
    "BoolQA": "According to the following passage, is the question true or false? Choose one from "
    "the option.",
    "MultiRC": "According to the following passage and question, is the candidate answer true or "
    "false? Choose one from the option.",
}
"""By the kind of task in CL_Benchmark."""

SUMMARIES = ("meetingbank", "20minuten", "py150")
"""Data sets of TRACE whose answers are long: these are scored by ROUGE-L."""


def folder_tasks(folder: Path, order: int | str | tuple[str, ...] | None) -> list[TaskConfig]:
    """The data sets of `folder` in `order`. Raises `DataError` where one is not there."""
    if not folder.is_dir():
        raise DataError(f"data.folder={folder}: no such folder")
    there = {_plain(path.name): path for path in _data_sets(folder)}
    if not there:
        raise DataError(
            f"data.folder={folder}: no data set there: expected folders with a training file, "
            f"train.json, train.jsonl or train.csv"
        )
    names = _names(order) if order is not None else tuple(path.name for path in there.values())
    chosen = []
    for name in names:
        plain = _plain(name)
        found = [there[key] for key in (plain, *ALIASES.get(plain, ())) if key in there]
        if not found:
            have = ", ".join(sorted(path.name for path in there.values()))
            raise DataError(f"data.order names {name!r}, which is not in {folder}, only: {have}")
        chosen.append(_task(found[0]))
    return chosen


def _names(order: int | str | tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(order, tuple):
        if not order:
            raise DataError("data.order is empty, expected names of data sets")
        return order
    if str(order) not in ORDERS:
        raise DataError(f"data.order={order!r}, expected one of {', '.join(ORDERS)}, or names")
    return ORDERS[str(order)]


def _data_sets(folder: Path) -> list[Path]:
    """Folders with a training file, at most two levels down, by name."""
    below = sorted(path for path in folder.iterdir() if path.is_dir())
    found = []
    for path in below:
        if _split_file(path, TRAIN) is not None:
            found.append(path)
        else:
            inner = sorted(item for item in path.iterdir() if item.is_dir())
            found += [item for item in inner if _split_file(item, TRAIN) is not None]
    return found


def _task(folder: Path) -> TaskConfig:
    train = _split_file(folder, TRAIN)
    assert train is not None
    labels = _labels(folder / "labels.json")
    return TaskConfig(
        name=folder.name,
        train=train,
        test=_split_file(folder, TEST),
        labels=labels,
        measure="rouge_l" if _plain(folder.name) in SUMMARIES else "exact_match",
        instruction=INSTRUCTIONS.get(folder.parent.name, ""),
    )


def _labels(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        return ()
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise DataError(f"{path}: {labels!r}, expected a list of answers")
    return tuple(labels)


def _split_file(folder: Path, names: tuple[str, ...]) -> Path | None:
    paths = (folder / f"{name}{suffix}" for name in names for suffix in FILES)
    return next((path for path in paths if path.is_file()), None)


def _plain(name: str) -> str:
    return re.sub(r"[^0-9a-z]", "", name.lower())
