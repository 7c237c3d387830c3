"""The demo from start to end: checks, one process for each method, results."""

from __future__ import annotations

import importlib.util
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console

from sculpt.demo import models
from sculpt.demo.assets import TEXTS, AssetError, fetch
from sculpt.demo.live import Live
from sculpt.demo.settings import DemoError, DemoSettings, check_space
from sculpt.demo.tasks import demo_tasks
from sculpt.demo.worker import Failure, work
from sculpt.files import write_json
from sculpt.plots import plot_matrices
from sculpt.report import Results
from sculpt.runs.directory import RunDirectory, RunError, check_out, versions
from sculpt.runs.methods import Method
from sculpt.runs.state import MethodResult, Progress

METHODS: tuple[Method, ...] = ("plain", "sculpt")


class Interrupted(Exception):
    """Somebody stopped the run; carries where it was."""

    def __init__(self, where: Progress | None) -> None:
        super().__init__("interrupted")
        self.where = where


def run_demo(settings: DemoSettings, console: Console) -> Results:
    """Train the built-in tasks with both methods and fill the run directory `settings.out`.

    Raises `DemoError` for anything that stands in the way, before anything is written where it can
    be known; and `Interrupted` after Ctrl-C, when `status.json` tells where the run stopped.
    """
    try:
        check_out(settings.out, "--out")
    except RunError as error:
        raise DemoError(str(error)) from None
    if importlib.util.find_spec("matplotlib") is None:
        raise DemoError("matplotlib is not installed: pip install 'sculpt-kernels[demo]'")
    with console.status("Model and texts"):
        try:
            for name in TEXTS:
                fetch(name)
            model = settings.model or (models.minilm() if settings.quick else models.smollm2())
        except AssetError as error:
            raise DemoError(str(error)) from error
        tasks = demo_tasks(
            settings.seed,
            train_per_task=settings.train_per_task,
            test_per_task=settings.test_per_task,
        )
    check_space(settings.out, model)
    results = Results(
        config={**settings.to_dict(), "model": _model_name(settings)},
        versions=versions(),
        tasks=[
            {"name": t.name, "labels": t.labels, "train": len(t.train), "test": len(t.test)}
            for t in tasks
        ],
    )
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        write_json(settings.out / "config.json", results.config)
        with Live(console, settings, METHODS, len(tasks)) as live:
            for method in METHODS:
                results.methods[method] = _run_method(method, settings, model, live)
                live.finished(method)
        (settings.out / "sculpt" / "model").replace(settings.out / "model")
        results.write(settings.out)
        plot_matrices(results, settings.out / "matrix.png")
    except OSError as error:
        raise DemoError(f"cannot write to --out {settings.out}: {error}") from error
    RunDirectory(settings.out).write_status("finished", None, "")
    return results


def _run_method(
    method: Method, settings: DemoSettings, model: Path, report: Callable[[Progress], None]
) -> MethodResult:
    """Run `method` in a fresh process and pass on what it reports."""
    config = settings.run_config(method, model)
    directory = RunDirectory(settings.out)
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=work, args=(config, sender), daemon=True)
    where: Progress | None = None
    directory.write_status("running", None, method)
    with _sigterm_as_interrupt():
        try:
            _start_deaf_to_ctrl_c(process)
            sender.close()
            for message in _messages(receiver):
                if isinstance(message, MethodResult):
                    process.join()
                    return message
                if isinstance(message, Failure):
                    raise DemoError(f"{method}: {message.message}")
                where = message
                report(message)
            process.join()
            raise DemoError(
                f"the process of {method} ended with exit code {process.exitcode}"
                + (": out of memory?" if process.exitcode == -signal.SIGKILL else "")
            )
        except KeyboardInterrupt:
            with suppress(OSError):
                directory.write_status("interrupted", where, method)
            raise Interrupted(where) from None
        except DemoError:
            with suppress(OSError):  # the disk may be what failed
                directory.write_status("failed", where, method)
            raise
        finally:
            process.terminate()
            process.join()
            receiver.close()


def _start_deaf_to_ctrl_c(process: multiprocessing.process.BaseProcess) -> None:
    """Ctrl-C reaches the whole process group; the parent alone decides and ends the worker."""
    resource_tracker.ensure_running()  # the first start would, and take SIGINT off the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()  # inherits the mask
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _messages(receiver: Connection) -> Iterator[Any]:
    """What the worker sends, until it closes its end."""
    while True:
        try:
            yield receiver.recv()
        except EOFError:
            return


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """A polite request to end is handled like Ctrl-C, as far as this thread may say so."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _model_name(settings: DemoSettings) -> str:
    if settings.model is not None:
        return settings.model.resolve().name
    return models.MINILM if settings.quick else models.SMOLLM2
