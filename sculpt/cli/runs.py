"""`sculpt train` and `sculpt resume` on a terminal or in a log."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from sculpt.messages import SculptWarning
from sculpt.report.results import Results, tables
from sculpt.runs.directory import check_out
from sculpt.runs.prepare import Prepared
from sculpt.runs.preview import preview
from sculpt.runs.start import resume, run
from sculpt.runs.state import Progress
from sculpt.runs.yaml_file import read_config

NAMES = {"subspaces": "subspaces", "train": "step", "certify": "certificate", "evaluate": "test"}
STEPS_SHOWN = 10


def train_command(
    file: Path, overrides: Sequence[str], dry_run: bool, skip_bad_rows: bool
) -> Results | None:
    """Run what `file` describes, or say what it would do."""
    console = _console()
    with _notes():
        more = ("data.skip_bad_rows=true",) if skip_bad_rows else ()
        config = read_config(file, (*overrides, *more))
        if dry_run:
            check_out(config.out)
            console.print(preview(Prepared(config)), highlight=False, markup=False, soft_wrap=True)
            return None
        results = run(config, Lines(console))
    _show(console, results, config.out)
    return results


def resume_command(folder: Path) -> Results | None:
    """Go on with the run in `folder`."""
    console = _console()
    with _notes():
        results = resume(folder, Lines(console))
    if results is None:
        console.print(f"{folder} is finished; nothing is left to do", highlight=False)
    else:
        _show(console, results, folder)
    return results


class Lines:
    """One line for each phase, and a few for the steps of a task."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._start = time.monotonic()
        self._scores: list[str] = []

    def __call__(self, now: Progress) -> None:
        if now.phase == "evaluate":
            self._scores.append(f"{now.scored} {now.accuracy:.3f}")
            if now.done == now.total:
                self._print(f"{now.task}: tested: {', '.join(self._scores)}")
                self._scores.clear()
            return
        shown = max(1, now.total // STEPS_SHOWN) if now.phase == "train" else now.total
        if now.done % shown == 0 or now.done in (1, now.total):
            line = f"{now.task}: {NAMES[now.phase]} {now.done}/{now.total}"
            if now.phase == "train":
                line += f"  loss {now.loss:.4f}  {now.tokens_per_second:,.0f} tokens/s"
            self._print(line)

    def _print(self, line: str) -> None:
        seconds = int(time.monotonic() - self._start)
        self._console.print(
            f"{seconds // 60:3d}:{seconds % 60:02d}  {line}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _console() -> Console:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console(markup=False)
    if not console.is_terminal:
        console.width = 120
    return console


@contextmanager
def _notes() -> Iterator[None]:
    """Print our own warnings in a line, and those of libraries not at all."""
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", SculptWarning)
        warnings.showwarning = lambda message, *_: errors.print(f"note: {message}", style="yellow")
        yield


def _show(console: Console, results: Results, folder: Path) -> None:
    console.print(tables(results))
    console.print(f"Run directory: {folder}", highlight=False, soft_wrap=True)
