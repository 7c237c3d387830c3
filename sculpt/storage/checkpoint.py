"""Checkpoints of a run: safetensors and JSON, written whole or not at all, never pickle.

    checkpoints/000007/
        manifest.json    format, and for each other file its size and SHA-256
        state.json       where the run is, what it has measured, what nested states look like
        ...              a file or folder for each part: safetensors and JSON

A checkpoint is written under a hidden name, flushed to the disk and renamed; a run that was killed
in between leaves a hidden folder that the next one removes. Files that have not changed since the
checkpoint before are hard links to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sculpt.storage.files import flush, link
from sculpt.storage.tensors import read_file, write_file

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message names the file and what to do."""


@dataclass(frozen=True)
class Part:
    """One file or folder of a checkpoint.

    write: called, when it has to be written, with its path and that in the checkpoint before, which
        is None where there is none.
    version: the content is the same as in the checkpoint before where this is; None: never.
    """

    write: Callable[[Path, Path | None], None]
    version: str | None = None


def tensors_part(tensors: Callable[[], Mapping[str, Tensor]], version: str | None = None) -> Part:
    """A safetensors file."""
    return Part(lambda path, previous: write_file(path, tensors()), version)


@dataclass(frozen=True)
class Loaded:
    """A checkpoint whose files are as they were written."""

    path: Path
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Content of the safetensors file `name`. Raises `CheckpointError` where it is missing."""
        if not (self.path / name).is_file():
            raise CheckpointError(f"{self.path / name} is missing")
        return read_file(self.path / name)


class Checkpoints:
    """The checkpoints in `folder`, of which the newest `keep` stay."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def names(self) -> list[str]:
        """Finished ones, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path.name for path in self.folder.iterdir() if path.name.isdigit())

    def write(self, state: Mapping[str, Any], parts: Mapping[str, Part]) -> None:
        """Write a new checkpoint and remove those that are too old.

        Raises `CheckpointError`, e.g. on a full disk; nothing is left of a failed attempt then, and
        the checkpoints before are whole.
        """
        if self.keep == 0:
            return
        names = self.names()
        number = int(names[-1]) + 1 if names else 1
        temporary = self.folder / f".{number:06d}.tmp"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            self._fill(temporary, state, parts, names[-1:])
            os.replace(temporary, self.folder / f"{number:06d}")
            flush(self.folder)
        except Exception as error:  # safetensors reports a full disk by an exception of its own
            shutil.rmtree(temporary, ignore_errors=True)
            advice = "The one before is whole: make" if names else "Make"
            raise CheckpointError(
                f"cannot write checkpoint {number} to {self.folder}: {error}. {advice} room "
                f"and go on with: sculpt resume {shlex.quote(str(self.folder.parent))}"
            ) from error
        self._remove_old()

    def read(self) -> Loaded | None:
        """The newest checkpoint, or None where there is none.

        Raises `CheckpointError` for a file that is missing, damaged, edited or of another format.
        """
        self._remove_unfinished()
        names = self.names()
        if not names:
            return None
        path = self.folder / names[-1]
        manifest = _read_json(path / MANIFEST, path)
        if manifest.get("format") != FORMAT:
            raise CheckpointError(
                f"{path / MANIFEST}: format {manifest.get('format')!r}, this version of sculpt "
                f"reads format {FORMAT}"
            )
        files = manifest.get("files")
        if not isinstance(files, dict) or STATE not in files:
            raise CheckpointError(f"{path / MANIFEST} is damaged: it lists no files")
        for name, entry in files.items():
            _check(path, name, entry)
        return Loaded(path, _read_json(path / STATE, path))

    def remove_all(self) -> None:
        """Remove every checkpoint, of a run that is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _fill(
        self, folder: Path, state: Mapping[str, Any], parts: Mapping[str, Part], before: list[str]
    ) -> None:
        old: dict[str, Any] = {}
        last = self.folder / before[0] if before else self.folder
        if before:
            old = _read_json(last / MANIFEST, last)["files"]
        files: dict[str, Any] = {}
        for name, part in parts.items():
            same = {
                file: entry
                for file, entry in old.items()
                if file.split("/")[0] == name and entry.get("version") == part.version is not None
            }
            if same:
                for file, entry in same.items():
                    link(last / file, folder / file)
                    files[file] = entry
                continue
            part.write(folder / name, last / name if (last / name).exists() else None)
            for path in sorted([folder / name, *(folder / name).rglob("*")]):
                file = path.relative_to(folder).as_posix()
                if path.is_file() and file in old and path.samefile(last / file):
                    files[file] = old[file]
                elif path.is_file():
                    files[file] = {**_seal(path), "version": part.version}
        (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
        files[STATE] = _seal(folder / STATE)
        manifest = {"format": FORMAT, "files": files}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        flush(folder / MANIFEST)
        flush(folder)

    def _remove_old(self) -> None:
        for name in self.names()[: -self.keep]:
            # Under a hidden name first: a kill in between must not leave half of a checkpoint.
            doomed = self.folder / f".{name}.tmp"
            os.replace(self.folder / name, doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _remove_unfinished(self) -> None:
        if self.folder.is_dir():
            for path in self.folder.glob(".*.tmp"):
                shutil.rmtree(path, ignore_errors=True)


def sha256(path: Path) -> str:
    """Digest of the file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(path: Path) -> dict[str, Any]:
    flush(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _check(path: Path, name: str, entry: Mapping[str, Any]) -> None:
    file = path / name
    advice = f"; remove {path} to go on from the checkpoint before it"
    if not file.is_file():
        raise CheckpointError(f"{file} is missing{advice}")
    size = file.stat().st_size
    if size != entry["bytes"]:
        raise CheckpointError(f"{file} has {size} bytes, expected {entry['bytes']}{advice}")
    if sha256(file) != entry["sha256"]:
        raise CheckpointError(f"{file} was changed after it was written{advice}")


def _read_json(file: Path, path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no checkpoint: {file.name} is missing") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    return value
