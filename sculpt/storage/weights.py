"""Weights on disk: plain Hugging Face directories and safetensors files, read a part at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class StoredWeightsError(ValueError):
    """Weights cannot be read; the message names the file and says what was expected."""


@dataclass(frozen=True)
class Stored:
    """One tensor on disk."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class StoredWeights:
    """All tensors of a model by name; nothing is read before it is asked for.

    Args:
        path: a directory with `model.safetensors`, or with `model.safetensors.index.json` and the
            files that it names, or with one `.safetensors` file; or a `.safetensors` file.

    Raises:
        StoredWeightsError: nothing is there, a file is damaged, or index and files disagree.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, Stored] = {}
        files, named = _files(path)
        for file in files:
            for name, stored in _describe(file).items():
                if name in self.tensors:
                    first = self.tensors[name].file.name
                    raise StoredWeightsError(f"{path}: {name} is both in {first} and {file.name}")
                self.tensors[name] = stored
        if named is not None:
            _check_index(path / INDEX, named, self.tensors)

    def read(self, name: str, index: Any = ...) -> Tensor:
        """The tensor, or the part of it that `index` selects (slices of its dimensions).

        The file is mapped for the time of the call only, so that what was read of it does not stay
        in memory.
        """
        with opened(self.tensors[name].file) as file:
            part = file.get_slice(name)[index]
            assert isinstance(part, Tensor)
            return part.clone()


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """The safetensors file, mapped into memory for the length of the block."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise StoredWeightsError(
            f"{file} is truncated, damaged or no safetensors file: {error}"
        ) from error
    except OSError as error:
        raise StoredWeightsError(f"{file} cannot be read: {error}") from error


def _files(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files of a model, and what its index says where it has one."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise StoredWeightsError(f"{path} is not a .safetensors file or a model directory")
        return [path], None
    if not path.is_dir():
        raise StoredWeightsError(f"{path} does not exist: expected a Hugging Face model directory")
    if (path / SINGLE).is_file():
        return [path / SINGLE], None
    if (path / INDEX).is_file():
        named = _weight_map(path / INDEX)
        files = sorted(set(named.values()))
        missing = [name for name in files if not (path / name).is_file()]
        if missing:
            raise StoredWeightsError(
                f"{path / INDEX} names {missing[0]}, which is not there "
                f"({len(missing)} of {len(files)} files are missing)"
            )
        return [path / name for name in files], named
    if (path / ADAPTER).is_file():
        raise StoredWeightsError(
            f"{path} holds a PEFT adapter, not a model: merge it into its base "
            "(PeftModel.from_pretrained(base, path).merge_and_unload()) and save that"
        )
    others = sorted(path.glob("*.safetensors"))
    if len(others) == 1:
        return others, None
    if others:
        raise StoredWeightsError(
            f"{path} has {len(others)} .safetensors files and no {INDEX} that says which belong "
            "together"
        )
    pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    if pickles:
        raise StoredWeightsError(
            f"{path} has {pickles[0]}, a pickle, which can run code when it is read; load the "
            "model with transformers and save_pretrained() it as safetensors"
        )
    raise StoredWeightsError(f"{path} has no {SINGLE} and no {INDEX}")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) and Path(file).name == file for file in found.values()):
            raise ValueError("its files must be names without a directory")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoredWeightsError(
            f"{index} is not an index of safetensors files, which has a 'weight_map' of tensor "
            f"names to file names: {error}"
        ) from error
    return dict(found)


def _describe(file: Path) -> dict[str, Stored]:
    """Names, shapes and dtypes; the header alone is read."""
    found = {}
    with opened(file) as handle:
        for name in handle.keys():  # noqa: SIM118  (not a mapping)
            part = handle.get_slice(name)
            dtype = DTYPES.get(part.get_dtype())
            if dtype is None:
                raise StoredWeightsError(
                    f"{file}: {name} has dtype {part.get_dtype()}, which is none of "
                    f"{', '.join(DTYPES)}"
                )
            found[name] = Stored(file, tuple(part.get_shape()), dtype)
    return found


def _check_index(index: Path, named: dict[str, str], tensors: dict[str, Stored]) -> None:
    """An index must name exactly the tensors that are in the files."""
    for name, file in named.items():
        if name not in tensors or tensors[name].file.name != file:
            raise StoredWeightsError(f"{index} names {name} in {file}, which is not there")
    extra = sorted(set(tensors) - set(named))
    if extra:
        raise StoredWeightsError(
            f"{tensors[extra[0]].file} has {extra[0]}, which {INDEX} does not name"
        )
