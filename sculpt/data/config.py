"""The configuration of a run's data: task files, a folder of data sets, or the built-in ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator


def absolute(path: Any) -> Path:
    """`path` from the root on, `~` expanded: what it names does not change with the folder.

    Raises `ValueError` for what is no path.
    """
    try:
        start = Path(path).expanduser().absolute()
    except TypeError:
        raise ValueError("expected a path") from None
    except RuntimeError:  # of `~name`
        raise ValueError("there is no such user, or no home folder") from None
    # `..` goes only where it does not lead out of a symbolic link.
    short = os.path.normpath(start)
    real = os.path.realpath(start)
    return Path(short if os.path.realpath(short) == real else real)


Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# Strict types would refuse the text and the lists that a file holds.
FilePath = Annotated[Path, Strict(False), BeforeValidator(absolute)]
Names = Annotated[tuple[str, ...], Strict(False)]


class Section(BaseModel):
    """A part of the configuration: typed, unchangeable, and without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TaskConfig(Section):
    """One task from files.

    train, test: files in one of the layouts of `sculpt.data.layouts`; without `test`, the share
        `holdout` of the training rows is kept apart.
    labels: the possible answers, for label-restricted scores.
    measure: how generated answers are scored.
    instruction, suffix: what rows of the layout "label" have before and after their text; an
        instruction is followed by a line with the options where there are labels.
    fields: from the names of `sculpt.data.layouts` to those in the file.
    """

    name: Annotated[str, Field(min_length=1)]
    train: FilePath
    test: FilePath | None = None
    labels: Names = ()
    measure: Literal["exact_match", "rouge_l", "choice"] = "exact_match"
    instruction: str = ""
    suffix: str = "\nAnswer:"
    fields: dict[Literal["prompt", "answer", "messages", "document", "text", "label"], str] = {}


class DataConfig(Section):
    """The task sequence: `tasks` from files, or data sets in a `folder`, or the built-in ones.

    folder: holds a folder for each data set: CL_Benchmark, TRACE, or `train.json` and `test.json`.
    order: of the data sets in `folder`: a preset, "1" to "6" or "trace", or folder names; all of
        them by name where it is left out.
    builtin: "demo": the three tasks of `sculpt demo`.
    train_rows, test_rows: at most so many of each task, drawn with the run's seed.
    holdout: share of the training rows that is tested on where there is no test file.
    skip_bad_rows: list rows that cannot be used instead of stopping at the first.
    """

    tasks: Annotated[tuple[TaskConfig, ...], Strict(False)] = ()
    folder: FilePath | None = None
    order: int | str | Names | None = None
    builtin: Literal["demo"] | None = None
    train_rows: Count | None = None
    test_rows: Count | None = None
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    skip_bad_rows: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("tasks", "folder", "builtin") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"expected exactly one of tasks, folder, builtin; got {', '.join(given) or 'none'}"
            )
        if self.order is not None and self.folder is None:
            raise ValueError("order needs folder, the data directory whose data sets it names")
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"tasks: two have the same name among {names}")
        return self
