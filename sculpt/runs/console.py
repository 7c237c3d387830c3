"""`sculpt train` and `sculpt resume` on a terminal or in a log."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import typer
from rich.console import Console

from sculpt.notices import SculptWarning
from sculpt.report import Results, tables
from sculpt.runs.checkpoint import CheckpointError
from sculpt.runs.directory import RunError, check_out
from sculpt.runs.prepare import Prepared
from sculpt.runs.preview import preview
from sculpt.runs.start import resume, run
from sculpt.runs.state import Progress
from sculpt.runs.yaml_file import read_config

NAMES = {"subspaces": "subspaces", "train": "step", "certify": "certificate", "evaluate": "test"}
STEPS_SHOWN = 10


def train_command(file: Path, overrides: Sequence[str], dry_run: bool, skip_bad_rows: bool) -> None:
    """Run what `file` describes, or say what it would do."""
    console = _console()

    def start() -> Results | None:
        more = ("data.skip_bad_rows=true",) if skip_bad_rows else ()
        config = read_config(file, (*overrides, *more))
        if dry_run:
            check_out(config.out)
            console.print(preview(Prepared(config)), highlight=False, markup=False, soft_wrap=True)
            return None
        return run(config, Lines(console))

    _report(console, start, lambda results: str(results.config["out"]))


def resume_command(folder: Path) -> None:
    """Go on with the run in `folder`."""
    console = _console()

    def start() -> Results | None:
        results = resume(folder, Lines(console))
        if results is None:
            console.print(f"{folder} is finished; nothing is left to do", highlight=False)
        return results

    _report(console, start, lambda _: str(folder))


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


def _report(
    console: Console, start: Callable[[], Results | None], folder: Callable[[Results], str]
) -> None:
    """Call `start`; show its results, or in one place what went wrong."""
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", SculptWarning)
            warnings.showwarning = lambda message, *_: errors.print(
                f"note: {message}", style="yellow"
            )
            results = start()
    except (CheckpointError, RunError, ValueError, TypeError, OSError) as error:
        errors.print(f"error: {error}", style="red")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        errors.print("stopped; go on with: sculpt resume RUN_DIR")
        raise typer.Exit(130) from None
    if results is not None:
        console.print(tables(results))
        console.print(f"Run directory: {folder(results)}", highlight=False, soft_wrap=True)
