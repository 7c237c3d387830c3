"""What earlier tasks use: a left and a right factor for every target, kept from task to task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sculpt.curvature.factors import KINDS, Factor
from sculpt.messages import some
from sculpt.storage.tensors import read_file, write_file
from sculpt.task.targets import Target

FILE = "sculpt_memory.safetensors"
ABOUT, MODEL = "about", "model"

VOLATILE = ("transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
"""Fields of a configuration that say nothing of the shape of a model."""


@dataclass(frozen=True)
class Sides:
    """Keys of the two factors of a weight `(m, n)`: `left` is `m x m`, `right` `n x n`.

    Of a linear layer `y = W x` the right one is that of its inputs, and the left one that of the
    gradients at its output; of `y = Wᵀ x`, such as the lookup in a table, it is the other way
    round; of a weight that is used in both ways each is the sum of both. Layers that read the same
    input share its factor.

    Attributes:
        reads: the side of the inputs: `"right"`, `"left"` or `"both"`.
    """

    left: str
    right: str
    reads: str = "right"


@dataclass
class Memory:
    """Sums over all rows that must not be forgotten.

    Attributes:
        factors: by key.
        sides: keys of each target, by its name.
        rows: how many rows were summed, by the name that was given to them, in their order.
    """

    factors: dict[str, Factor] = field(default_factory=dict)
    sides: dict[str, Sides] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.rows)

    def of(self, name: str) -> tuple[Factor, Factor] | None:
        """The left and the right factor of a target; `None` where no row has reached it."""
        keys = self.sides.get(name)
        if keys is None or not {keys.left, keys.right} <= self.factors.keys():
            return None
        return self.factors[keys.left], self.factors[keys.right]

    def outputs(self, name: str, X: Tensor) -> Tensor | None:
        """`tr X A Xᵀ` `(...)` with the second moment `A` of the inputs of a target, float64.

        The sum of squares of the outputs that `X` `(..., m, n)` would give in place of the weight;
        `None` where no row has reached the target, or its inputs are on both sides.
        """
        pair = self.of(name)
        reads = self.sides[name].reads if pair is not None else "both"
        if pair is None or reads == "both":
            return None
        return pair[0].quadratic(X.mT) if reads == "left" else pair[1].quadratic(X)

    def curvature(self, name: str) -> float:
        """`tr S tr A` of a target that was reached, with `A` the mean over its vectors."""
        keys = self.sides[name]
        read, written = (keys.left, keys.right) if keys.reads == "left" else (keys.right, keys.left)
        inputs = self.factors[read]
        mean = inputs.trace() / inputs.count.clamp_min(1)
        return float((self.factors[written].trace() * mean).sum())

    def is_thin(self, name: str) -> bool:
        """Whether a target was reached by fewer vectors than it has inputs.

        A member of a stack, and a row of a table, may have none.
        """
        pair = self.of(name)
        if pair is None:
            return False
        inputs = pair[0] if self.sides[name].reads == "left" else pair[1]
        return inputs.kind != "diagonal" and float(inputs.count.sum()) < inputs.total.shape[-2]

    def merge(self, other: Memory) -> None:
        """Add the sums of `other`, which was collected on the same targets.

        Raises:
            ValueError: a factor is of another kind or shape there. Nothing has been added then.
        """
        for name in other.sides.keys() & self.sides.keys():
            if other.sides[name].right != self.sides[name].right:
                self.separate(name)
                other.separate(name)
        for key, factor in other.factors.items():
            own = self.factors.get(key)
            if own is not None and (own.kind, own.total.shape) != (factor.kind, factor.total.shape):
                raise ValueError(
                    f"{key!r} is {_words(own)} in what is protected and {_words(factor)} in what "
                    "is added"
                )
        for key, factor in other.factors.items():
            if key in self.factors:
                self.factors[key].merge(factor)
            else:
                self.factors[key] = factor
        self.add_sides(other.sides)
        for name, count in other.rows.items():
            self.rows[name] = self.rows.get(name, 0) + count

    def add_sides(self, others: Mapping[str, Sides]) -> None:
        """Those of memories with the same keys, which may have used weights otherwise."""
        for name, other in others.items():
            own = self.sides.setdefault(name, other)
            if own.reads != other.reads:
                self.sides[name] = replace(own, reads="both")

    def separate(self, name: str) -> None:
        """Give a target that shares the factor of its inputs one of its own, with the same sums."""
        sides, own = self.sides.get(name), f"{name}.right"
        if sides is not None and sides.right != own:
            self.sides[name] = replace(sides, right=own)
            if sides.right in self.factors:
                self.factors[own] = deepcopy(self.factors[sides.right])

    def check(self, targets: Sequence[Target]) -> None:
        """Raises:
        ValueError: the factors are not those of these targets.
        """
        unknown = [name for name in self.sides if name not in {t.name for t in targets}]
        if unknown:
            raise ValueError(
                f"what is protected is of another model or of other targets: it has {some(unknown)}"
            )
        for target in targets:
            pair = self.of(target.name)
            for factor, size in zip(pair or (), target.shape[-2:], strict=False):
                shape = (*target.shape[:-2], size)
                if tuple(factor.total.shape[: len(shape)]) != shape:
                    raise ValueError(
                        f"what is protected does not fit {target.name!r}, which is "
                        f"{' x '.join(map(str, target.shape))}: a factor has the shape "
                        f"{tuple(factor.total.shape)}"
                    )

    def tensors(self) -> dict[str, Tensor]:
        """All of it for a safetensors file, what is no tensor as the bytes of its JSON."""
        if not self:
            return {}
        about = {
            "kinds": {key: factor.kind for key, factor in self.factors.items()},
            "sides": {name: astuple(keys) for name, keys in self.sides.items()},
            "rows": self.rows,
        }
        sums = {
            f"{key}/{name}": tensor
            for key, factor in self.factors.items()
            for name, tensor in factor.tensors().items()
        }
        return {
            ABOUT: torch.frombuffer(bytearray(json.dumps(about), "utf-8"), dtype=torch.uint8),
            **sums,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], device: torch.device) -> Memory:
        """The inverse of `tensors`."""
        if not tensors:
            return cls()
        about = json.loads(bytes(tensors[ABOUT].tolist()))
        parts: dict[str, dict[str, Tensor]] = {}
        for full, tensor in tensors.items():
            key, _, name = full.rpartition("/")
            # In memory of its own: products round by where a file's tensors lie.
            parts.setdefault(key, {})[name] = tensor.to(device, copy=True)
        factors = {key: KINDS[kind](**parts[key]) for key, kind in about["kinds"].items()}
        sides = {name: Sides(*keys) for name, keys in about["sides"].items()}
        return cls(factors, sides, dict(about["rows"]))

    def save(self, path: Path, model: nn.Module) -> None:
        """Write a safetensors file, atomically; `path` may be a directory."""
        about = torch.frombuffer(bytearray(_identity(model), "utf-8"), dtype=torch.uint8)
        write_file(_file(path), {**self.tensors(), MODEL: about})

    @classmethod
    def load(cls, path: Path, model: nn.Module, device: torch.device) -> Memory:
        """The inverse of `save`.

        Raises:
            FileNotFoundError, ValueError: as `read`, or it is of a model with another
                configuration.
        """
        return cls.read(path, device, _identity(model))

    @classmethod
    def read(cls, path: Path, device: torch.device, identity: str | None = None) -> Memory:
        """What `save` wrote for a model with that identity, or for any.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, is none, or is of another model.
        """
        file = _file(path)
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist; Sculptor.save_memory writes it")
        tensors = read_file(file)
        if not {ABOUT, MODEL} <= tensors.keys():
            raise ValueError(f"{file} was not written by Sculptor.save_memory")
        written = bytes(tensors.pop(MODEL).tolist()).decode()
        if identity is not None and written != identity:
            raise ValueError(f"{file} is of a model with another configuration")
        try:
            memory = cls.from_tensors(tensors, device)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is damaged: {type(error).__name__}: {error}") from error
        for key, factor in memory.factors.items():
            if not all(bool(tensor.isfinite().all()) for tensor in factor.tensors().values()):
                raise ValueError(f"{file} is damaged: {key!r} has values that are not finite")
        return memory


def _file(path: Path) -> Path:
    return path if path.suffix == ".safetensors" else path / FILE


def _identity(model: nn.Module) -> str:
    """A hash of the configuration of a model of transformers; the same for all others."""
    config = getattr(model, "config", None)
    fields = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    values = _lasting(fields)
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _lasting(fields: Any) -> Any:
    """Of a configuration, which may have others inside."""
    if not isinstance(fields, dict):
        return fields
    kept = {key: value for key, value in fields.items() if str(key) not in VOLATILE}
    return {str(k): _lasting(v) for k, v in kept.items() if not str(k).startswith("_")}


def _words(factor: Factor) -> str:
    return f"{factor.kind} {tuple(factor.total.shape)}"
