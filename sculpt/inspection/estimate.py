"""What training a model costs, from its path alone: formulas, and a pass without values."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sculpt.config import SculptConfig
from sculpt.inspection.fake_model import (
    Source,
    build,
    find_source,
    stored_dtype,
    training_batch,
)
from sculpt.inspection.result import LORA_RANK, Inspection, Method, Row, Setting
from sculpt.inspection.spectra import Progress, Spectrum, find_weights, spectra, stored_values
from sculpt.inspection.statistics import Statistics, trace_statistics
from sculpt.inspection.trace import Pass, trace_pass
from sculpt.task.bases import Bases
from sculpt.task.cost import Cost, Matrix, Storage, lora, osf, plain, sculpt
from sculpt.task.engines import make_matrix
from sculpt.task.originals import Original
from sculpt.task.targets import Target, Targets, find_targets

DTYPES = ("float64", "float32", "bfloat16", "float16")
STATE_DTYPES = ("float32", "trained", "int8")
LABELS = {
    "plain": "plain full fine-tuning",
    "sculpt": "sculpt",
    "lora": f"LoRA r{LORA_RANK}",
    "osf": "PEFT OSF",
}


def inspect_model(
    model: Any,
    config: SculptConfig | None = None,
    *,
    tokens: int = 4096,
    sequence: int | None = None,
    micro_batches: int = 1,
    dtype: str | None = None,
    checkpointing: bool = False,
    state_dtype: str = "float32",
    read_spectra: bool = True,
    progress: Progress | None = None,
) -> Inspection:
    """What one training step of `model` costs: plain, with sculpt, with LoRA, with PEFT's OSF.

    The model is built without values and run once plain and once with sculpt, so that nothing is
    loaded and every architecture that transformers can build is covered; LoRA and OSF are known by
    their formulas. With weights beside the configuration their singular values are summarised, one
    matrix in memory at a time.

    Args:
        model: a Hugging Face model directory, a `config.json`, or a configuration object.
        config: what would be sculpted; the default configuration if None.
        tokens: in one optimizer step, over all micro-batches.
        sequence: tokens of one sequence; at most 1024 and what the model allows if None.
        micro_batches: passes that a step accumulates.
        dtype: of the weights: a name such as `"bfloat16"`; that of the configuration if None.
        checkpointing: layers are recomputed in the backward instead of kept.
        state_dtype: of AdamW's two states: `"float32"`, `"int8"`, or `"trained"` for the dtype of
            what trains, as in `torch.optim`.
        read_spectra: summarise singular values where weights are there.
        progress: called as `progress(done, total, name)` after each spectrum.

    Raises:
        TypeError, ValueError: an argument does not fit; there is no such model, or it is quantised.
    """
    config = config or SculptConfig()
    source = find_source(model)
    weight_dtype = _dtype(dtype) or stored_dtype(source)
    sequence = _sequence(source, tokens, sequence, micro_batches, state_dtype)
    name = str(weight_dtype).removeprefix("torch.")
    setting = Setting(tokens, sequence, micro_batches, checkpointing, name, state_dtype)
    notes: list[str] = []
    with _quiet(), FakeTensorMode(allow_non_fake_inputs=True):
        fake = build(source, weight_dtype, checkpointing=checkpointing)
        targets = find_targets(fake, config)
        state = None if state_dtype == "trained" else getattr(torch, state_dtype)
        storage = Storage.of(targets.chosen[0], config, state, micro_batches)
        sizes = {name: p.numel() for name, p in fake.named_parameters()}
        others = _free(fake, targets) if config.others == "train" else []
        prefix = str(getattr(fake, "base_model_prefix", ""))
        try:
            statistics = _statistics(fake, source, targets.chosen, setting, config)
            passes = _trace(fake, source, targets.chosen, others, setting, storage, config)
        except Exception as error:
            passes, statistics = {}, None
            first = str(error).partition("\n")[0]
            notes.append(
                f"no activations and no FLOPs: {source.kind} cannot be run without values "
                f"({type(error).__name__}: {first})"
            )
    found: dict[str, Spectrum] = {}
    if read_spectra:
        weights = find_weights(source.directory)
        if isinstance(weights, str):
            notes.append(f"no spectra: {weights}")
        else:
            shapes = {_stored(t): tuple(t.parameter.shape) for t in targets.chosen}
            preserved = {_stored(t): t.preserved for t in targets.chosen}
            found = spectra(stored_values(weights, shapes, prefix), preserved, progress)
    seen = passes["plain"].rows if passes else {}
    rows = [_row(target, seen, storage, found) for target in targets.chosen]
    outside = sum(sizes.values()) - sum(row.matrix.elements for row in rows)
    free = sum(parameter.numel() for parameter in others)
    return Inspection(
        model=source.name,
        kind=source.kind,
        parameters=sum(sizes.values()),
        trained=_described(config),
        setting=setting,
        methods={
            name: _method(name, rows, outside, free, storage, passes.get(name)) for name in LABELS
        },
        rows=rows,
        statistics=statistics,
        left_out=targets.left_out,
        notes=notes,
    )


def _free(model: nn.Module, targets: Targets) -> list[nn.Parameter]:
    """What trains beside the matrices where that is asked for."""
    named = model.named_parameters()
    return [p for name, p in named if name in targets.left_out and p.requires_grad]


def _stored(target: Target) -> str:
    place = target.places[0]
    return f"{place.path}.{place.parameter}"


def _row(
    target: Target,
    seen: dict[str, tuple[int, bool]],
    storage: Storage,
    found: dict[str, Spectrum],
) -> Row:
    rows, needs_dx = seen.get(target.places[0].path, (0, True))
    matrix = Matrix.of(target, rows * storage.micro_batches, needs_dx)
    costs = {
        "plain": plain(matrix, storage),
        "sculpt": sculpt(matrix, storage),
        "lora": lora(matrix, storage, LORA_RANK),
        "osf": osf(matrix, storage),
    }
    return Row(matrix, costs, found.get(_stored(target)))


def _method(
    name: str, rows: list[Row], outside: int, free: int, storage: Storage, run: Pass | None
) -> Method:
    """`outside`: elements that are in no matrix; `free`: how many of them train."""
    total = sum((row.costs[name] for row in rows), Cost(weights=outside * storage.weight.itemsize))
    if name in ("plain", "sculpt"):
        total += Cost(
            trainable=free,
            gradients=free * storage.weight.itemsize,
            optimizer=storage.of_states(free, storage.weight),
        )
    if run is None:
        return Method(LABELS[name], total)
    return Method(
        LABELS[name],
        total,
        activations=run.kept,
        peak=total.held - total.gradients + run.peak,
        flops=run.flops * storage.micro_batches + total.update,
    )


def _trace(
    model: nn.Module,
    source: Source,
    chosen: list[Target],
    others: list[nn.Parameter],
    setting: Setting,
    storage: Storage,
    config: SculptConfig,
) -> dict[str, Pass]:
    """A pass that trains the matrices themselves, and one with the layers of sculpt."""
    inputs, loss = training_batch(model, source, setting.batch, setting.sequence)
    names = [target.places[0].path for target in chosen]

    def train(matrices: bool) -> None:
        model.requires_grad_(False)
        for parameter in (*others, *(t.parameter for t in chosen if matrices)):
            parameter.requires_grad_(True)

    def trace() -> Pass:
        return trace_pass(model, loss, inputs.values(), names)

    train(matrices=True)
    passes = {"plain": trace()}
    compact = config.chosen_engine == "compact"
    train(matrices=not compact)
    if compact:
        for target in chosen:
            original = Original(target.parameter.detach(), "device")
            make_matrix(target, _bases(target, storage), original, config)
    return passes | {"sculpt": trace()}


def _statistics(
    model: nn.Module, source: Source, chosen: list[Target], setting: Setting, config: SculptConfig
) -> Statistics | None:
    """What protecting a task takes, where that is asked for."""
    if config.subspaces == "weights":
        return None
    inputs, loss = training_batch(model, source, setting.batch, setting.sequence)
    return trace_statistics(model, chosen, config, loss, inputs.values())


def _bases(target: Target, storage: Storage) -> Bases:
    """As the compact engine finds them, without values."""
    *batch, m, n = target.shape
    t, h = target.trainable_rank, target.preserved

    def basis(size: int, rank: int) -> Tensor:
        return torch.empty(*batch, size, rank, dtype=storage.basis)

    U, V = basis(m, t), basis(n, t)
    if not storage.full or m == n:
        return Bases(U, V, None, "none", 1.0, "none")
    removed = basis(max(m, n), h)
    return Bases(None if m > n else U, V if m > n else None, removed, "none", 1.0, "none")


def _described(config: SculptConfig) -> str:
    engine = config.chosen_engine
    how = engine if engine != "compact" else f"compact, {config.coordinates} coordinates"
    if config.effective_rank is not None:
        return f"{how}, effective_rank={config.effective_rank} preserved"
    if config.ranks is not None:
        return f"{how}, ranks adapt around {1 - config.ranks.trr:.4g} of the directions"
    return f"{how}, {config.unfreeze_rank_ratio:.4g} of the directions train"


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {name!r}")
    found: torch.dtype = getattr(torch, name)
    return found


def _sequence(
    source: Source, tokens: int, sequence: int | None, micro_batches: int, state_dtype: str
) -> int:
    """Tokens of one sequence; raises `ValueError` for a number that does not fit."""
    values = {"tokens": tokens, "micro_batches": micro_batches, "sequence": sequence}
    for name, value in values.items():
        given = name != "sequence" or value is not None
        if given and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be an int of at least 1; got {value!r}")
    if state_dtype not in STATE_DTYPES:
        options = ", ".join(STATE_DTYPES)
        raise ValueError(f"state_dtype must be one of {options}; got {state_dtype!r}")
    longest = getattr(source.config, "max_position_embeddings", None) or 1024
    if sequence is None:
        sequence = min(1024, longest, max(1, tokens // micro_batches))
    if sequence > longest:
        raise ValueError(f"sequence={sequence} is longer than the {longest} that the model allows")
    if tokens % (sequence * micro_batches):
        raise ValueError(
            f"tokens={tokens} must be a multiple of sequence x micro_batches = "
            f"{sequence} x {micro_batches}"
        )
    return sequence


@contextmanager
def _quiet() -> Iterator[None]:
    """A fake model is none to be warned about."""
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
