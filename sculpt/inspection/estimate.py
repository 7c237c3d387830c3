"""From the path of a model to the cost of training it, without its weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sculpt.config import SculptConfig
from sculpt.inspection import cost as costs
from sculpt.inspection.cost import Cost, Matrix, Storage
from sculpt.inspection.peers import LoraLayer, OsfLayer
from sculpt.inspection.result import Inspection, Method, Row, Setting
from sculpt.inspection.skeleton import (
    Source,
    build,
    find_source,
    stored_dtype,
    training_batch,
    without_values,
)
from sculpt.inspection.spectra import Spectrum, find_weights, spectra, stored_values
from sculpt.inspection.trace import Pass, trace_pass
from sculpt.storage.weights import StoredWeights
from sculpt.task.bases import Bases
from sculpt.task.engines import make_matrix
from sculpt.task.originals import Original, place_of_original
from sculpt.task.targets import Target, find_targets

Progress = Callable[[int, int, str], None]
DTYPES = ("float64", "float32", "bfloat16", "float16")
STATE_DTYPES = ("float32", "trained", "int8")


def inspect_model(
    model: Any,
    config: SculptConfig | None = None,
    *,
    tokens: int = 4096,
    sequence: int | None = None,
    micro_batches: int = 1,
    dtype: str | None = None,
    checkpointing: bool = False,
    states: int = 2,
    state_dtype: str = "float32",
    lora_rank: int = 32,
    read_spectra: bool = True,
    progress: Progress | None = None,
) -> Inspection:
    """What one training step of `model` costs: plain, with sculpt, with LoRA, with PEFT's OSF.

    The model is built without values and run once for each method, so that nothing is loaded and
    every architecture that transformers can build is covered. With weights beside the configuration
    their singular values are summarised, one matrix in memory at a time.

    Args:
        model: a Hugging Face model directory, a `config.json`, or a configuration object.
        config: what would be sculpted; the default configuration if None.
        tokens: in one optimizer step, over all micro-batches.
        sequence: tokens of one sequence; at most 1024 and what the model allows if None.
        micro_batches: passes that a step accumulates.
        dtype: of the weights: a name such as `"bfloat16"`; that of the configuration if None.
        checkpointing: layers are recomputed in the backward instead of kept.
        states: optimizer states per trained element: 2 for AdamW, 1 for Lion, 0 for bare SGD.
        state_dtype: `"float32"`, `"int8"`, or `"trained"` for the dtype of what trains, as in
            `torch.optim`.
        read_spectra: summarise singular values where weights are there.
        progress: called as `progress(done, total, name)` after each spectrum.

    Raises:
        TypeError, ValueError: an argument does not fit; there is no such model, or it is quantised.
    """
    config = config or SculptConfig()
    source = find_source(model)
    weight_dtype = _dtype(dtype) or stored_dtype(source)
    setting = _setting(source, tokens, sequence, micro_batches, states, state_dtype)
    setting = replace(
        setting,
        checkpointing=checkpointing,
        dtype=str(weight_dtype).removeprefix("torch."),
        lora_rank=lora_rank,
    )
    notes: list[str] = []
    with _quiet(), without_values():
        skeleton = build(source, weight_dtype, checkpointing=checkpointing)
        targets = find_targets(skeleton, config)
        storage = _storage(config, targets.chosen[0], setting)
        sizes = {name: p.numel() for name, p in skeleton.named_parameters()}
        others = [p for name, p in skeleton.named_parameters() if name in targets.left_out]
        others = [p for p in others if p.requires_grad]
        prefix = str(getattr(skeleton, "base_model_prefix", ""))
        passes = _trace_all(
            skeleton, source, targets.chosen, others, setting, storage, config, notes
        )
    found: dict[str, Spectrum] = {}
    if read_spectra:
        weights = find_weights(source.directory)
        if isinstance(weights, str):
            notes.append(f"no spectra: {weights}")
        else:
            found = _spectra(weights, targets.chosen, prefix, progress)
    rows = _rows(targets.chosen, passes.get("plain"), storage, setting, config, found)
    return Inspection(
        model=source.name,
        kind=source.kind,
        parameters=sum(sizes.values()),
        trained=_described(config),
        setting=setting,
        methods=_methods(rows, passes, storage, setting, config, sizes, others),
        rows=rows,
        left_out=targets.left_out,
        notes=notes,
    )


def _storage(config: SculptConfig, target: Target, setting: Setting) -> Storage:
    """In which dtypes and where everything is; all targets are alike in that."""
    weight = target.parameter.dtype
    in_weight = config.basis_dtype == "weight"
    return Storage(
        weight=weight,
        basis=weight if in_weight else torch.promote_types(weight, torch.float32),
        state=None if setting.state_dtype == "trained" else getattr(torch, setting.state_dtype),
        states=setting.states,
        full_coordinates=config.coordinates == "full",
        original=place_of_original(config, target),
        micro_batches=setting.micro_batches,
    )


def _spectra(
    weights: StoredWeights, targets: list[Target], prefix: str, progress: Progress | None
) -> dict[str, Spectrum]:
    wanted = {_stored_name(target): tuple(target.parameter.shape) for target in targets}
    preserved = {_stored_name(target): target.preserved for target in targets}
    return spectra(stored_values(weights, wanted, prefix), preserved, progress)


def _stored_name(target: Target) -> str:
    place = target.places[0]
    return f"{place.path}.{place.parameter}"


LABELS = {
    "plain": "plain full fine-tuning",
    "sculpt": "sculpt",
    "lora": "LoRA r{rank}",
    "osf": "PEFT OSF",
}


def _methods(
    rows: list[Row],
    passes: dict[str, Pass],
    storage: Storage,
    setting: Setting,
    config: SculptConfig,
    sizes: dict[str, int],
    others: list[nn.Parameter],
) -> dict[str, Method]:
    """`others`: what trains beside the matrices where that is asked for."""
    other = sum(sizes.values()) - sum(row.matrix.elements for row in rows)
    free = sum(parameter.numel() for parameter in others)
    frozen = Cost(weights=other * storage.weight.itemsize)
    found = {}
    for name, label in LABELS.items():
        beside = frozen
        if config.others == "train" and name in ("plain", "sculpt"):
            beside = frozen + Cost(
                trainable=free,
                gradients=free * storage.weight.itemsize,
                optimizer=storage.of_states(free, storage.weight),
            )
        total = sum((row.costs[name] for row in rows), beside)
        run = passes.get(name)
        found[name] = Method(
            label=label.format(rank=setting.lora_rank),
            cost=total,
            activations=None if run is None else run.kept,
            peak=None if run is None else total.held - total.gradients + run.peak,
            flops=None if run is None else run.flops * setting.micro_batches + total.update,
        )
    return found


def _rows(
    targets: list[Target],
    plain: Pass | None,
    storage: Storage,
    setting: Setting,
    config: SculptConfig,
    found: dict[str, Spectrum],
) -> list[Row]:
    rows = []
    for target in targets:
        seen, needs_dx = (0, True)
        if plain is not None:
            seen, needs_dx = plain.rows.get(target.places[0].path, (0, True))
        m, n = target.shape[-2:]
        matrix = Matrix(
            target.name,
            (m, n),
            target.trainable_rank,
            count=math.prod(target.shape[:-2]),
            rows=seen * setting.micro_batches,
            needs_dx=needs_dx,
        )
        by_method = {
            "plain": costs.plain(matrix, storage),
            "sculpt": _sculpted(matrix, storage, config),
            "lora": costs.lora(matrix, storage, setting.lora_rank),
            "osf": costs.osf(matrix, storage),
        }
        rows.append(Row(matrix, by_method, found.get(_stored_name(target))))
    return rows


def _sculpted(matrix: Matrix, storage: Storage, config: SculptConfig) -> Cost:
    if config.chosen_engine == "compact":
        return costs.compact(matrix, storage)
    return costs.dense_engine(
        matrix, storage, update=config.chosen_engine == "update", form=config.constraint
    )


def _trace_all(
    model: nn.Module,
    source: Source,
    chosen: list[Target],
    others: list[nn.Parameter],
    setting: Setting,
    storage: Storage,
    config: SculptConfig,
    notes: list[str],
) -> dict[str, Pass]:
    """One pass by each method, the same skeleton in turn; empty where it cannot run."""
    batch = setting.tokens // (setting.micro_batches * setting.sequence)
    inputs, loss = training_batch(model, source, batch, setting.sequence)
    modules = {t.places[0].path: t.places[0].module for t in chosen}
    adapted = {t.places[0].path: t for t in chosen if len(t.shape) == 2}
    trace = partial(trace_pass, model, loss, list(inputs.values()), list(modules))
    passes = {}

    def trains(matrices: bool, others_too: bool) -> None:
        model.requires_grad_(False)
        for target in chosen:
            target.parameter.requires_grad_(matrices)
        for parameter in others:
            parameter.requires_grad_(others_too)

    try:
        trains(True, config.others == "train")
        passes["plain"] = trace()
        trains(False, False)
        for name, layer in (("lora", LoraLayer), ("osf", OsfLayer)):
            for path, target in adapted.items():
                rank = setting.lora_rank if name == "lora" else target.trainable_rank
                shape = (target.shape[-2], target.shape[-1])
                _swap(model, path, layer(modules[path], shape, rank))
            passes[name] = trace()
            for path in adapted:
                _swap(model, path, modules[path])
        trains(config.chosen_engine != "compact", config.others == "train")
        if config.chosen_engine == "compact":
            for target in chosen:
                weight = target.parameter.detach()
                bases = _bases_without_values(target, storage)
                make_matrix(target, bases, Original(weight, "device"), config)
        passes["sculpt"] = trace()
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else ""
        notes.append(
            f"no activations and no FLOPs: {source.kind} cannot be run without values "
            f"({type(error).__name__}: {first})"
        )
        passes.clear()
    return passes


def _bases_without_values(target: Target, storage: Storage) -> Bases:
    *batch, m, n = target.shape
    t, h = target.trainable_rank, target.preserved

    def basis(size: int, rank: int) -> Tensor:
        return torch.empty(*batch, size, rank, dtype=storage.basis)

    U, V, removed = basis(m, t), basis(n, t), None
    if storage.full_coordinates and m != n:
        removed = basis(max(m, n), h)
        return Bases(None if m > n else U, V if m > n else None, removed, "none", 1.0, "none")
    return Bases(U, V, removed, "none", 1.0, "none")


def _swap(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


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


def _setting(
    source: Source,
    tokens: int,
    sequence: int | None,
    micro_batches: int,
    states: int,
    state_dtype: str,
) -> Setting:
    values = {"tokens": tokens, "micro_batches": micro_batches}
    if sequence is not None:
        values["sequence"] = sequence
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1; got {value!r}")
    if states not in (0, 1, 2, 3):
        raise ValueError(f"states must be 0, 1, 2 or 3; got {states!r}")
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
    return Setting(tokens, sequence, micro_batches, False, "", states, state_dtype, 0)


@contextmanager
def _quiet() -> Iterator[None]:
    """A skeleton is no model to be warned about."""
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
