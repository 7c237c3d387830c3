"""Start a run, or go on with one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sculpt.data.config import absolute
from sculpt.messages import SculptWarning
from sculpt.report.results import Results
from sculpt.runs.config import RunConfig
from sculpt.runs.directory import RunDirectory, RunError, check_out, how_to_go_on, locked, versions
from sculpt.runs.loop import Run
from sculpt.runs.prepare import Prepared
from sculpt.runs.space import check_disk, space_of
from sculpt.runs.state import Progress, Report
from sculpt.runs.termination import Terminated


def ignore(progress: Progress) -> None:
    """A report to nobody."""


def run(config: RunConfig, report: Report = ignore) -> Results:
    """Train the task sequence that `config` describes, and fill its run directory.

    report: told of every step. Raises `RunError`, `CheckpointError`, `DataError` or `ValueError`;
    what can be known before anything is written is raised before. After SIGTERM, in the main thread
    and where nobody else has set a handler, it saves and raises `Terminated`, a `SystemExit`.
    """
    check_out(config.out)
    prepared = Prepared(config)
    check_space(prepared)
    with _advice(config.out), locked(config.out) as directory:
        check_out(config.out)  # nobody else was quicker
        directory.describe(config, prepared.digest(), prepared.bad.found)
        if prepared.bad.found:
            warnings.warn(
                f"{len(prepared.bad.found)} rows left out, listed in {config.out / 'config.json'}; "
                f"the first: {prepared.bad.found[0]}",
                SculptWarning,
                stacklevel=2,
            )
        return Run(prepared, directory, report).finish()


def resume(folder: Path, report: Report = ignore) -> Results | None:
    """Go on with the run in `folder` from its newest checkpoint; None where it is finished.

    The weights at the end are, bit for bit, those of a run that was never interrupted, on the same
    machine with the same versions. Raises `RunError` or `CheckpointError` where that cannot be,
    and `Terminated` as `run` does.
    """
    folder = absolute(folder)
    if not folder.is_dir():
        raise RunError(f"{folder}: no such directory, expected that of a run")
    RunDirectory(folder).described()
    with _advice(folder), locked(folder) as directory:
        config, described = directory.described()
        if directory.status() == "finished":
            return None
        directory.remove_unfinished()
        _warn_of_changes(folder, described["versions"])
        prepared = Prepared(config.model_copy(update={"out": folder}))
        if prepared.digest() != described["data_digest"]:
            raise RunError(f"{folder}: the data have changed since the run began")
        check_space(prepared)
        run = Run(prepared, directory, report)
        run.restore()
        return run.finish()


@contextmanager
def _advice(folder: Path) -> Iterator[None]:
    """A run that is stopped says how to go on with it."""
    try:
        yield
    except (KeyboardInterrupt, Terminated) as stop:
        if advice := how_to_go_on(folder):
            stop.add_note(advice)
        raise


def check_space(prepared: Prepared) -> None:
    """Raise `RunError` where the disk cannot hold the run."""
    check_disk(space_of(prepared.strategy)[1], prepared.config)


def _warn_of_changes(folder: Path, began: dict[str, object]) -> None:
    now = versions()
    changed = [f"{n} {v} (now {now.get(n)})" for n, v in began.items() if now.get(n) != v]
    if changed:
        warnings.warn(
            f"{folder} began with {', '.join(changed)}: the last bits of its weights may differ",
            SculptWarning,
            stacklevel=3,
        )
