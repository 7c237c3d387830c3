"""The demo from start to end: checks, one process for each method, results."""

from __future__ import annotations

import importlib.util
import multiprocessing
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sculpt.demo import models
from sculpt.demo.assets import TEXTS, AssetError, fetch
from sculpt.demo.live import Live
from sculpt.demo.settings import DemoError, DemoSettings, check_out, check_space
from sculpt.demo.tasks import demo_tasks
from sculpt.demo.worker import Failure, work
from sculpt.files import write_json
from sculpt.report import Results
from sculpt.training import MethodResult, Progress

METHODS = ("plain", "sculpt")
PACKAGES = ("sculpt", "torch", "transformers", "numpy", "safetensors", "tokenizers")


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
    check_out(settings.out)
    if importlib.util.find_spec("matplotlib") is None:
        raise DemoError("matplotlib is not installed: pip install 'sculpt[demo]'")
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
        versions=_versions(),
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
        results.write(settings.out)
    except OSError as error:
        raise DemoError(f"cannot write to --out {settings.out}: {error}") from error
    _write_status(settings.out, "finished", None)
    return results


def _run_method(
    method: str, settings: DemoSettings, model: Path, report: Callable[[Progress], None]
) -> MethodResult:
    """Run `method` in a fresh process and pass on what it reports."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=work, args=(method, settings, model, sender), daemon=True)
    where: Progress | None = None
    _write_status(settings.out, "running", None, method)
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
                _write_status(settings.out, "interrupted", where, method)
            raise Interrupted(where) from None
        except DemoError:
            with suppress(OSError):  # the disk may be what failed
                _write_status(settings.out, "failed", where, method)
            raise
        finally:
            process.terminate()
            process.join()
            receiver.close()


def _start_deaf_to_ctrl_c(process: multiprocessing.process.BaseProcess) -> None:
    """Ctrl-C reaches the whole process group; the parent alone decides and ends the worker."""
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


def _write_status(out: Path, state: str, where: Progress | None, method: str = "") -> None:
    """`status.json`: "running", "finished", "failed" or "interrupted", and where."""
    status: dict[str, Any] = {"state": state, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    if method:
        status["method"] = method
    if where is not None:
        status |= {
            "task": where.task,
            "phase": where.phase,
            "step" if where.phase == "train" else "done": where.done,
            "of": where.total,
        }
    write_json(out / "status.json", status)


def _model_name(settings: DemoSettings) -> str:
    if settings.model is not None:
        return settings.model.resolve().name
    return models.MINILM if settings.quick else models.SMOLLM2


def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "system": platform.system()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found | {"machine": platform.machine(), "threads": torch.get_num_threads()}
