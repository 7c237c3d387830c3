"""A model that computes as in an evaluation, and is left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Without dropout, fused or compiled parts, or gradients of parameters; recomputing still."""
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    for module in modes:
        # They recompute in training mode only; `Products` leaves out their dropout.
        module.training = _recomputes(module)
    model.requires_grad_(False)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"), _one_by_one(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _recomputes(module: nn.Module) -> bool:
    """Whether it is a layer of transformers with gradient checkpointing."""
    kinds = {kind.__name__ for kind in type(module).__mro__}
    return "GradientCheckpointingLayer" in kinds and bool(module.gradient_checkpointing)


@contextmanager
def _one_by_one(model: nn.Module) -> Iterator[None]:
    """Let mixtures of experts of transformers multiply by one expert after the other."""
    name = "_experts_implementation"
    configs = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), name)}
    before = [(config, getattr(config, name)) for config in configs.values()]
    for config, _ in before:
        setattr(config, name, "eager")
    try:
        yield
    finally:
        for config, value in before:
            setattr(config, name, value)
