"""What a run starts from: its tasks, its model, and all rows as tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch

from sculpt.data.examples import DataError, Example, Task
from sculpt.data.rows import BadRows
from sculpt.data.tasks import read_tasks
from sculpt.logs import check_loggers
from sculpt.models.encoding import PackedRows
from sculpt.models.learner import Learner
from sculpt.models.load import check_directory, load_learner
from sculpt.runs.config import RunConfig
from sculpt.runs.lm_eval import check_lm_eval
from sculpt.runs.method import Setting
from sculpt.runs.methods import method_class


class Prepared:
    """Everything that `config` names, read and checked; nothing is written.

    tasks: without the rows that were left out. rows: the training rows of each task, as tokens.
    learner, strategy: the model, and the method on it.
    bad: the rows that were left out. cut: how many rows of each task lost a part of their passage.

    Raises `DataError` or `ValueError` for data or a model that cannot be used.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        check_directory(config.model)
        check_lm_eval(config.evaluation.lm_eval)
        check_loggers(config.loggers)
        self.bad = BadRows(config.data.skip_bad_rows)
        tasks = read_tasks(config.data, config.seed, self.bad)
        torch.manual_seed(config.seed)  # a new classification head is random
        training = config.training
        self.learner: Learner = load_learner(
            config.model_kind,
            config.model,
            tasks,
            dtype=config.dtype,
            max_tokens=training.max_tokens,
            max_text_tokens=training.max_text_tokens,
            packing=training.packing,
            score_batch=config.evaluation.batch_size,
            max_new_tokens=config.evaluation.max_new_tokens,
        )
        self.learner.model.to(device_of(config))
        self.tasks: list[Task] = []
        self.rows: list[PackedRows] = []
        self.cut: list[int] = []
        for task in tasks:
            train, rows = self._fitting(task.train)
            test, test_rows = self._fitting(task.test)
            self.tasks.append(replace(task, train=train, test=test))
            self.rows.append(rows)
            self.cut.append(rows.cut + test_rows.cut)
        names = [task.name for task in self.tasks]
        setting = Setting(self.learner, config, names, self.rows)
        self.strategy = method_class(config.method)(setting)

    def _fitting(self, examples: Sequence[Example]) -> tuple[list[Example], PackedRows]:
        fitting: list[Example] = []
        rows = PackedRows()
        for example in examples:
            try:
                rows.extend(self.learner.encode_all(example))
                fitting.append(example)
            except DataError as error:
                self.bad.add(*str(error).split(": ", 1))
        return fitting, rows

    def digest(self) -> str:
        """SHA-256 of all tasks and tokens, in hexadecimal."""
        digest = hashlib.sha256()
        for task, rows in zip(self.tasks, self.rows, strict=True):
            digest.update(repr((task.name, task.labels, task.measure)).encode())
            for row in chain(rows, task.test):
                digest.update(repr(row).encode())
        return digest.hexdigest()


def device_of(config: RunConfig) -> torch.device:
    """Where the run computes. Raises `ValueError` for a device that is not there."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=config.device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={config.device!r} cannot be used: {error}") from None
