"""Run the demo: its checks, a process for each method, results and a picture.

A method has a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from rich.console import Console

from sculpt.demo import models
from sculpt.demo.assets import TEXTS, fetch
from sculpt.demo.general import GENERAL, general_loss
from sculpt.demo.settings import TEST_PER_TASK, DemoError, DemoSettings, check_space
from sculpt.demo.tasks import demo_tasks
from sculpt.models.load import quiet_transformers
from sculpt.report import charts
from sculpt.report.results import Results
from sculpt.runs.config import RunConfig
from sculpt.runs.directory import RunDirectory, check_out, versions
from sculpt.runs.start import run
from sculpt.runs.state import MethodResult, Progress, Report
from sculpt.runs.termination import EXIT_CODE, Terminated
from sculpt.storage.files import write_json


def run_demo(settings: DemoSettings, console: Console, report: Report) -> Results:
    """Train the built-in tasks with each method and fill the run directory `settings.out`.

    Raises `DemoError`, `RunError` or `AssetError` for what stands in the way, before anything is
    written where it can be known. After Ctrl-C and SIGTERM `status.json` tells where it stopped.
    """
    check_out(settings.out, "--out")
    if importlib.util.find_spec("matplotlib") is None:
        raise DemoError("matplotlib is not installed: pip install 'sculpt-kernels[demo]'")
    with console.status("Model and texts"):
        for name in TEXTS:
            fetch(name)
        model = settings.model or (models.minilm() if settings.quick else models.smollm2())
        tasks = demo_tasks(settings.seed, test_per_task=TEST_PER_TASK)
        check_space(settings.out, model)
        before = general_loss(model, encoder=settings.quick)
    results = Results(
        config={**vars(settings), "model": _model_name(settings)},
        versions=versions(),
        tasks=[
            {"name": t.name, "labels": t.labels, "train": len(t.train), "test": len(t.test)}
            for t in tasks
        ],
    )
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        write_json(settings.out / "config.json", results.config)
        for name, config in settings.runs(model).items():
            shutil.rmtree(settings.out / "model", ignore_errors=True)  # of the method before
            result = results.methods[name] = _run_method(name, config, report)
            (config.out / "model").replace(settings.out / "model")
            after = general_loss(settings.out / "model", encoder=settings.quick)
            result.general_scores = {"before": {GENERAL: before}, "after": {GENERAL: after}}
        results.write(settings.out)
        charts.save_png(charts.matrices(results), settings.out / "matrix.png")
    except OSError as error:
        raise DemoError(f"cannot write to --out {settings.out}: {error}") from error
    except (KeyboardInterrupt, Terminated):
        directory = RunDirectory(settings.out)
        if directory.status() == "running":  # between or after the methods
            directory.write_status("interrupted", None, "")
        raise
    RunDirectory(settings.out).write_status("finished", None, "")
    return results


def _run_method(method: str, config: RunConfig, report: Report) -> MethodResult:
    """Run `config` in a fresh process and pass on what it reports, as the method of this name."""
    demo = config.out.parent
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_work, args=(config, sender), daemon=True)
    where: Progress | None = None
    RunDirectory(demo).write_status("running", None, method)
    try:
        _start_without_sigint(process)
        sender.close()
        for message in _messages(receiver):
            if isinstance(message, MethodResult):
                process.join()
                return message
            if isinstance(message, str):
                raise DemoError(f"{method}: {message}")
            where = replace(message, method=method)
            report(where)
        process.join()
        if process.exitcode in (EXIT_CODE, -signal.SIGTERM):
            raise Terminated
        raise DemoError(
            f"the process of {method} ended with exit code {process.exitcode}"
            + (": out of memory?" if process.exitcode == -signal.SIGKILL else "")
        )
    except (KeyboardInterrupt, Terminated, DemoError) as error:
        # Its own run has no checkpoints, so nothing is worth waiting for.
        _kill(process)
        stopped = not isinstance(error, DemoError)
        for directory in (demo, config.out):
            if directory.is_dir():
                with suppress(OSError):  # the disk may be what failed
                    state = "interrupted" if stopped else "failed"
                    RunDirectory(directory).write_status(state, where, method)
        if where is not None:
            error.add_note(f"in {where.method}, {where.task}, {where.phase} {where.done}")
        raise
    finally:
        _kill(process)
        receiver.close()


def _work(config: RunConfig, connection: Connection) -> None:
    """Run `config`, sending `Progress` and at last `MethodResult`, or why it failed."""
    quiet_transformers()
    try:
        results = run(config, connection.send)
        connection.send(results.methods[config.method])
    except (BrokenPipeError, ConnectionResetError):
        return  # The parent is gone: nobody is left to tell.
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        connection.send(str(error))


def _kill(process: multiprocessing.process.BaseProcess) -> None:
    if process.pid is not None:
        process.kill()
        process.join()


def _start_without_sigint(process: multiprocessing.process.BaseProcess) -> None:
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


def _model_name(settings: DemoSettings) -> str:
    if settings.model is not None:
        return settings.model.resolve().name
    return models.MINILM if settings.quick else models.SMOLLM2
