"""The certificate of two checkpoints, from disk alone: what `sculpt verify` does.

One matrix after the other, in panels, so that memory depends on the width of the widest matrix and
neither on the number of layers nor on the size of the files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sculpt.certificate.leak import STORED, Certificate, LeakRow
from sculpt.certificate.streamed import Panel, bytes_for, streamed_leak
from sculpt.config import SculptConfig
from sculpt.memory import available_memory_bytes
from sculpt.messages import some
from sculpt.storage.weights import Stored, StoredWeights, StoredWeightsError
from sculpt.task.patterns import (
    Patterns,
    match_any,
    matches_end,
    names_of,
    no_match,
    split_targets,
    without_match,
)
from sculpt.task.ranks import preserved_rank

Progress = Callable[[int, int, str], None]
CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Plan:
    """Which tensors are measured, and which must not have changed."""

    matrices: list[tuple[str, int]]
    others: list[str]


@dataclass(frozen=True)
class DiskCertificate:
    """What two checkpoints say.

    Attributes:
        certificate: leak of every matrix that may change, against a fresh decomposition of the
            weights before.
        moved: tensors that changed and were to stay as they are.
        hidden: matrices whose limit, given by the rounding of their dtype, is so large that a
            change without any constraint could pass.
        free: tensors that changed and may, with `others="train"`.
        compared: tensors that were to stay, changed or not.
    """

    certificate: Certificate
    hidden: list[str]
    moved: list[str] = field(default_factory=list)
    free: list[str] = field(default_factory=list)
    compared: int = 0

    @property
    def broken(self) -> bool:
        return bool(self.moved) or not self.certificate.ok

    @property
    def ok(self) -> bool:
        """Nothing protected moved, and rounding is small enough to tell."""
        return not self.broken and not self.hidden

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.certificate.to_dict(),
            "ok": self.ok,
            "broken": self.broken,
            "hidden": self.hidden,
            "moved": self.moved,
            "free": self.free,
            "compared": self.compared,
        }

    def __str__(self) -> str:
        rows = self.certificate.rows
        if not self.moved and not self.free and not any(row.change for row in rows):
            same = len(rows) + self.compared
            return f"Nothing changed: all {same} tensors are the same, bit by bit."
        verdict = "is BROKEN" if self.broken else "is NOT TOLD" if self.hidden else "holds"
        lines = [self.certificate.header(verdict)]
        if self.broken:
            lines.append(
                "Each task keeps it by itself: with more than one in between, compare the "
                "checkpoint after each with the one before it. 16-bit weights are rounded once at "
                "the end of a task, and in each step until then."
            )
        if self.hidden:
            lines.append(
                f"For {len(self.hidden)} of {len(rows)} matrices any change would pass: theirs is "
                f"no larger than the rounding of their dtype ({some(self.hidden)}). The "
                "certificate made during training judges the float32 truth; save float32 weights "
                "to have one from disk."
            )
        lines.append(self.certificate.table())
        if self.moved:
            lines.append(
                f"{len(self.moved)} of {self.compared} other tensors changed, and none may: "
                + some(self.moved)
            )
        else:
            lines.append(f"The {self.compared} other tensors are what they were, bit by bit.")
        if self.free:
            lines.append(f"{len(self.free)} tensors train without a constraint: {some(self.free)}")
        return "\n".join(lines)


def verify_checkpoints(
    before: Path, after: Path, config: SculptConfig, *, progress: Progress | None = None
) -> DiskCertificate:
    """Measure what moved between two checkpoints of one model.

    A matrix may change if `config.target_modules` takes it and `config.exclude_modules` does not;
    `"all-linear"` takes every matrix and stack of matrices here, since files do not tell a linear
    layer from an embedding. What changed must keep the constraint; everything else must be the
    same, bit by bit. With `others="train"` the targets must be named, and what is none of them is
    free.

    Args:
        before, after: see `StoredWeights`.
        config: ranks, targets and constraint.
        progress: called as `progress(done, total, name)`.

    Raises:
        StoredWeightsError: a file cannot be read, or both are not of one model.
        ValueError: the configuration does not fit, a weight is not finite, or memory is short.
    """
    old, new = StoredWeights(before), StoredWeights(after)
    _check_alike(old, new)
    plan = make_plan(old, config)
    _check_memory(old, plan)
    total = len(plan.matrices) + len(plan.others)
    rows: list[LeakRow] = []
    hidden: list[str] = []
    moved: list[str] = []
    free: list[str] = []
    for done, (name, preserved) in enumerate(plan.matrices, start=1):
        for row in _rows(name, preserved, old, new, config.constraint):
            rows.append(row)
            # Half of the least that a change without any constraint leaves there on average.
            m, n = old.tensors[name].shape[-2:]
            core = config.constraint == "core"
            blind = math.sqrt(preserved**2 / (m * n) if core else preserved / min(m, n)) / 2
            if row.change > 0 and min(row.limit, row.rounding_limit) >= blind:
                hidden.append(row.name)
        if progress is not None:
            progress(done, total, name)
    for done, name in enumerate(plan.others, start=len(plan.matrices) + 1):
        if _differs(name, old, new):
            (free if config.others == "train" else moved).append(name)
        if progress is not None:
            progress(done, total, name)
    certificate = Certificate(rows, None, STORED)
    return DiskCertificate(certificate, hidden, moved, free, len(plan.others))


def _check_memory(weights: StoredWeights, plan: Plan) -> None:
    """Raise `ValueError` where the largest matrix cannot be decomposed on this machine."""
    sides = {name: min(weights.tensors[name].shape[-2:]) for name, _ in plan.matrices}
    widest = max(sides, key=lambda name: sides[name])
    needed, free = bytes_for(sides[widest]), available_memory_bytes()
    if free is not None and needed > free:
        shape = " x ".join(map(str, weights.tensors[widest].shape))
        raise ValueError(
            f"{widest} is {shape}: to decompose it in float64 takes {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB of memory are free"
        )


def make_plan(weights: StoredWeights, config: SculptConfig) -> Plan:
    """Matrices with their preserved ranks, and all other tensors, in the order of the files.

    Raises:
        ValueError: a pattern of the configuration matches nothing in the files.
    """
    linear, named = split_targets(config.target_modules)
    exclude = config.exclude_modules or ()
    if config.others == "train" and linear:
        raise ValueError(
            "others='train' with target_modules='all-linear': files do not tell a linear layer "
            "from an embedding, so name the targets, e.g. --target-modules q_proj,k_proj,v_proj"
        )
    names = {full: names_of(*full.rpartition(".")[::2]) for full in weights.tensors}
    candidates = {}
    for full, stored in weights.tensors.items():
        if _is_matrix(stored):
            # As in a model: the name of a module takes its weight and its stacks.
            several = not full.endswith(".weight") and len(stored.shape) == 2
            candidates[full] = names[full][-1:] if several else names[full]
    _check_patterns(weights, config, named, names, candidates)
    matrices, others = [], []
    for full, stored in weights.tensors.items():
        taken = full in candidates and (linear or match_any(candidates[full], named))
        if taken and not match_any(names[full], exclude):
            shape = (stored.shape[-2], stored.shape[-1])
            matrices.append((full, preserved_rank(names[full][-1], shape, config)))
        else:
            others.append(full)
    if not matrices:
        raise ValueError(
            f"target_modules={config.target_modules!r} and exclude_modules="
            f"{config.exclude_modules!r} leave no matrix of {weights.path}, which has "
            f"{some([*candidates]) or 'none'}"
        )
    return Plan(matrices, others)


def _check_patterns(
    weights: StoredWeights,
    config: SculptConfig,
    named: Patterns,
    names: Mapping[str, tuple[str, ...]],
    candidates: Mapping[str, tuple[str, ...]],
) -> None:
    """Raise `ValueError` for a pattern that matches nothing: a slip must not judge silently."""
    tensors = [name for group in names.values() for name in group]
    matrices = [name for group in candidates.values() for name in group]
    exclude = config.exclude_modules or ()
    ranks = [p for p in config.rank_pattern if not any(matches_end(n, p) for n in matrices)]
    for name, given, entries, known in (
        ("target_modules", config.target_modules, without_match(named, matrices), matrices),
        ("exclude_modules", exclude, without_match(exclude, tensors), tensors),
        ("rank_pattern", config.rank_pattern, ranks, matrices),
    ):
        for entry in entries:
            raise ValueError(
                f"{no_match(name, given, entry, known)}; {weights.path} has {some(known)} "
                "(a tied weight is stored under one of its names)"
            )


def _is_matrix(stored: Stored) -> bool:
    return (
        stored.dtype.is_floating_point
        and stored.dtype.itemsize >= 2
        and len(stored.shape) in (2, 3)
        and min(stored.shape[-2:]) >= 2
    )


def _check_alike(old: StoredWeights, new: StoredWeights) -> None:
    missing = sorted(set(old.tensors) - set(new.tensors))
    extra = sorted(set(new.tensors) - set(old.tensors))
    if missing or extra:
        parts = []
        if missing:
            parts.append(f"{new.path} lacks {some(missing)}")
        if extra:
            parts.append(f"{old.path} lacks {some(extra)}")
        shared = len(set(old.tensors) & set(new.tensors))
        raise StoredWeightsError(
            f"not two checkpoints of one model, {shared} tensors are in both: {'; '.join(parts)}. "
            "Names that only differ in layout become the same when both are loaded and saved by "
            "the same version of transformers"
        )
    for name, stored in old.tensors.items():
        other = new.tensors[name]
        if stored.shape != other.shape:
            raise StoredWeightsError(
                f"{name} has shape {stored.shape} in {old.path} and {other.shape} in {new.path}"
            )


def _rows(
    name: str, preserved: int, old: StoredWeights, new: StoredWeights, constraint: str
) -> Iterator[LeakRow]:
    """The row of a matrix, or one for each matrix of a stack."""
    module = name.removesuffix(".weight")
    stored = old.tensors[name]
    if not _differs(name, old, new):
        yield LeakRow(module, 0.0, 0.0, 0.0, math.inf, 0.0, 0.0, constraint)
        return
    m, n = stored.shape[-2:]
    turned = m > n

    def panel(weights: StoredWeights, lead: tuple[int, ...]) -> Panel:
        def read(start: int, stop: int) -> Tensor:
            long_side = slice(start, stop)
            if turned:
                return weights.read(name, (*lead, long_side, slice(None))).mT
            return weights.read(name, (*lead, slice(None), long_side))

        return read

    stack: list[tuple[int, ...]] = [()]
    if len(stored.shape) == 3:
        stack = [(index,) for index in range(stored.shape[0])]
    for lead in stack:
        yield streamed_leak(
            f"{module}[{lead[0]}]" if lead else module,
            (min(m, n), max(m, n)),
            preserved,
            panel(old, lead),
            panel(new, lead),
            turned=turned,
            dtype=new.tensors[name].dtype,
            constraint=constraint,
        )


def _differs(name: str, old: StoredWeights, new: StoredWeights) -> bool:
    """Whether any value changed; NaN counts as changed."""
    stored = old.tensors[name]
    if not stored.shape:
        return not torch.equal(old.read(name), new.read(name))
    row_bytes = max(1, stored.nbytes // max(1, stored.shape[0]))
    rows = max(1, CHUNK_BYTES // row_bytes)
    return any(
        not torch.equal(*(weights.read(name, slice(start, start + rows)) for weights in (old, new)))
        for start in range(0, stored.shape[0], rows)
    )
