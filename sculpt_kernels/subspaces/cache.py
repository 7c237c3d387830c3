"""Subspaces on disk, found again by the weight they belong to."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sculpt_kernels.subspaces.methods import Subspace
from sculpt_kernels.subspaces.split import split

FORMAT = 2
_NUMBERS = [field.name for field in fields(Subspace) if field.name not in ("U", "V")]


class SubspaceCache:
    """A directory of subspaces, one safetensors file each, keyed by weight hash and request.

    A file is named by a SHA-256 of the weight's bytes, dtype and shape and of what was asked for,
    so a weight that changed is never served the subspace of the old one. It is written to a
    temporary name and renamed. On load, key, request and checksum are verified: a file that does
    not fit is reported with a warning, computed again and replaced.

    Args:
        directory: made when the first subspace is stored.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)

    def split(
        self,
        W: Tensor,
        *,
        rank: int | None = None,
        energy: float | None = None,
        part: str = "low",
        method: str = "auto",
    ) -> Subspace:
        """As `sculpt_kernels.split`, from disk where it was computed before.

        Raises:
            TypeError, ValueError: an argument does not fit.
            OSError: the directory cannot be written.
        """
        from safetensors import SafetensorError

        request = {"rank": rank, "energy": energy, "part": part, "method": method}
        path = self.path(W, request)
        if path.exists():
            try:
                return _load(path, request, W)
            except (SafetensorError, ValueError, KeyError, OSError) as error:
                warnings.warn(
                    f"cached subspace {path} is not usable and is computed again: {error}",
                    stacklevel=2,
                )
        found = split(W, rank=rank, energy=energy, part=part, method=method)
        self._store(path, request, found)
        return found

    def path(self, W: Tensor, request: dict[str, Any]) -> Path:
        """Where the subspace of `W` for `request` is kept."""
        digest = hashlib.sha256()
        digest.update(json.dumps([FORMAT, str(W.dtype), list(W.shape), request]).encode())
        digest.update(_bytes(W))
        return self.directory / f"{digest.hexdigest()}.safetensors"

    def _store(self, path: Path, request: dict[str, Any], found: Subspace) -> None:
        from safetensors.torch import save_file

        self.directory.mkdir(parents=True, exist_ok=True)
        tensors = {"U": found.U.cpu(), "V": found.V.cpu()}
        about = {name: getattr(found, name) for name in _NUMBERS}
        about |= {"key": path.stem, "request": request, "checksum": _checksum(tensors)}
        handle, temporary = tempfile.mkstemp(dir=self.directory, suffix=".partial")
        os.close(handle)
        try:
            save_file(tensors, temporary, metadata={"subspace": json.dumps(about)})
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)


def _load(path: Path, request: dict[str, Any], W: Tensor) -> Subspace:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        about = json.loads((file.metadata() or {})["subspace"])
        tensors = {name: file.get_tensor(name) for name in ("U", "V")}
    if about["key"] != path.stem:
        raise ValueError("it was stored for another weight or request")
    if about["request"] != request:
        raise ValueError(f"it answers {about['request']}, not {request}")
    if about["checksum"] != _checksum(tensors):
        raise ValueError("its checksum does not match its contents")
    U, V = (tensors[name].to(W.device) for name in ("U", "V"))
    return Subspace(U=U, V=V, **{name: about[name] for name in _NUMBERS})


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(X: Tensor) -> Any:
    flat = X.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""
