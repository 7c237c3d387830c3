"""The directory of one run: one owner at a time, and everything in it written whole.

config.json     all settings, versions, a digest of the data, and the rows left out
status.json     "running", "finished", "failed" or "interrupted", and where
checkpoints/    while the run goes on; see `sculpt.storage.checkpoint`
ranks/          of each task whose ranks adapt: a table of what each matrix got and why
results.json    everything measured
model/          the model after the last task, a plain Hugging Face directory
models/         the models after each task, where asked for
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from sculpt.installation import DISTRIBUTION
from sculpt.runs.config import RunConfig, describe
from sculpt.runs.state import Progress
from sculpt.storage.checkpoint import Checkpoints
from sculpt.storage.files import flush, replacing_directory, write_json

FORMAT = 1
LOCK = ".lock"
PACKAGES = (DISTRIBUTION, "torch", "transformers", "numpy", "safetensors", "tokenizers")


class RunError(RuntimeError):
    """A run cannot start or go on; the message says why and what to do."""


class RunDirectory:
    """Files of the run in `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def describe(self, config: RunConfig, digest: str, left_out: Sequence[str]) -> None:
        """Write `config.json`; `left_out` are the rows that could not be used."""
        values = {
            "format": FORMAT,
            "config": config.model_dump(mode="json"),
            "versions": versions(),
            "data_digest": digest,
            "rows_left_out": list(left_out),
        }
        write_json(self.path / "config.json", values)

    def described(self) -> tuple[RunConfig, dict[str, Any]]:
        """The settings in `config.json`, and everything in it. Raises `RunError`."""
        file = self.path / "config.json"
        if not file.is_file():
            raise RunError(f"{self.path} is no run directory: it has no config.json")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(values, dict) or values.get("format") != FORMAT:
                raise RunError(f"{file} is not of a run, or of another version's")
            return RunConfig.model_validate(values["config"]), values
        except ValidationError as error:
            wrong = "; ".join(describe(item) for item in error.errors())
            raise RunError(f"{file}: {wrong}") from error
        except (ValueError, KeyError) as error:
            raise RunError(f"{file} is damaged: {error}") from error

    def write_status(self, state: str, where: Progress | None, method: str) -> None:
        """Write `status.json`: what the run does, and where it is."""
        status: dict[str, Any] = {
            "state": state,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "method": method,
        }
        if where is not None:
            status |= {
                "task": where.task,
                "phase": where.phase,
                "step" if where.phase == "train" else "done": where.done,
                "of": where.total,
            }
        write_json(self.path / "status.json", status)

    def status(self) -> str:
        """The state in `status.json`; "" where there is none."""
        try:
            return str(json.loads((self.path / "status.json").read_text(encoding="utf-8"))["state"])
        except (OSError, ValueError, KeyError):
            return ""

    def remove_unfinished(self) -> None:
        """Remove what a killed run was about to write."""
        folders = [self.path, *(self.path / name for name in ("models", "ranks"))]
        hidden = [path for folder in folders for path in folder.glob(".*")]
        for path in hidden:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK:
                path.unlink(missing_ok=True)

    def save_model(self, name: str, *writers: Callable[[Path], object]) -> None:
        """Let all write to the folder `name` in this one; nothing is left of a failed attempt."""
        path = self.path / name
        if path.is_dir():  # of a run that was killed right after it wrote this
            return
        try:
            with replacing_directory(path) as temporary:
                for write in writers:
                    write(temporary)
                for file in temporary.rglob("*"):
                    flush(file)
        except Exception as error:  # safetensors reports a full disk by an exception of its own
            raise RunError(
                f"the model could not be saved to {path}: {error}. Is the disk full? Make room and "
                f"go on with: sculpt resume {shlex.quote(str(self.path))}"
            ) from error


@contextmanager
def locked(path: Path) -> Iterator[RunDirectory]:
    """Own the run directory `path`, which is made if need be.

    Raises `RunError` while another process owns it. The system releases it when a process dies.
    """
    from filelock import FileLock, Timeout

    try:
        path.mkdir(parents=True, exist_ok=True)
        with FileLock(path / LOCK, blocking=False):
            yield RunDirectory(path)
    except Timeout:
        raise RunError(f"{path} is in use by another run; wait for it, or take another") from None


def how_to_go_on(path: Path) -> str:
    """The command that goes on with the run in `path`; "" where there is none that can."""
    directory = RunDirectory(path)
    try:
        directory.described()
    except RunError:
        return ""
    if directory.status() == "finished":
        return ""
    how = "go on" if Checkpoints(path / "checkpoints", keep=1).names() else "begin it again"
    return f"{how} with: sculpt resume {shlex.quote(str(path))}"


def check_out(out: Path, option: str = "out") -> None:
    """Raise `RunError` unless `out` is a new or empty directory that can be written."""
    if out.exists() and not out.is_dir():
        raise RunError(f"{option} {out} is a file: expected a new or empty directory")
    if out.is_dir() and any(path.name != LOCK for path in out.iterdir()):
        advice = how_to_go_on(out)
        raise RunError(
            f"{option} {out} is not empty: expected a new or empty directory"
            + (f"; {advice}" if advice else "")
        )
    above = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise RunError(f"{option} {out} cannot be written: no permission to create it in {above}")


def versions() -> dict[str, Any]:
    """Of the packages that a run depends on, and of the machine."""
    found: dict[str, Any] = {"python": platform.python_version(), "system": platform.system()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found | {"machine": platform.machine(), "threads": torch.get_num_threads()}
