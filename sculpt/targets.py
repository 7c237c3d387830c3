"""Which matrices of a model are sculpted, and why the others are not."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn

from sculpt.config import SculptConfig
from sculpt.ranks import preserved_rank


@dataclass(frozen=True)
class Target:
    """One linear layer to sculpt, and the preserved rank `h` of its `m x n` weight."""

    name: str
    module: nn.Linear
    preserved: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.module.out_features, self.module.in_features

    @property
    def trainable_rank(self) -> int:
        return min(self.shape) - self.preserved


@dataclass(frozen=True)
class Targets:
    """The chosen matrices, and every parameter that was left out with the reason."""

    chosen: list[Target]
    left_out: dict[str, str]


def find_targets(model: nn.Module, config: SculptConfig) -> Targets:
    """Match `config.target_modules` against the model by PEFT's rules.

    Raises:
        ValueError: nothing matches, a named module is of a kind that cannot be sculpted, or a rank
            does not fit its matrix.
    """
    chosen: dict[str, Target] = {}
    refused: dict[str, str] = {}
    head = _output_embedding(model)
    owners = _owners(model)
    for name, module in model.named_modules():
        if not _is_wanted(name, module, config.target_modules, head):
            continue
        reason = _refusal(name, module, owners)
        if reason is not None:
            refused[name] = reason
        else:
            assert isinstance(module, nn.Linear)
            shape = (module.out_features, module.in_features)
            chosen[name] = Target(name, module, preserved_rank(name, shape, config))
    if refused and (not chosen or config.target_modules != "all-linear"):
        name, reason = next(iter(refused.items()))
        raise ValueError(
            f"target_modules={config.target_modules!r} matches {name!r}, which cannot be "
            f"sculpted: {reason}"
        )
    if not chosen:
        raise ValueError(
            f"target_modules={config.target_modules!r} matches nothing; "
            f"the model's linear layers end in {_linear_suffixes(model)}"
        )
    left_out = {}
    for full, _ in model.named_parameters(remove_duplicate=False):
        name, _, parameter = full.rpartition(".")
        if name in chosen and parameter == "weight":
            continue
        module = model.get_submodule(name)
        left_out[full] = refused.get(name) or _why_not(module, parameter, head)
    return Targets(list(chosen.values()), left_out)


def _is_wanted(name: str, module: nn.Module, targets: object, head: nn.Module | None) -> bool:
    if targets == "all-linear":
        linear_like = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        return linear_like and module is not head
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    assert isinstance(targets, list | tuple)
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in targets)


def _refusal(name: str, module: nn.Module, owners: dict[int, list[str]]) -> str | None:
    """Why the module cannot be sculpted, or None if it can."""
    kind = type(module).__name__
    if type(module) is not nn.Linear:
        return f"{kind} is not a plain torch.nn.Linear"
    weight = module.weight
    if not torch.is_floating_point(weight):
        return f"its weight is {weight.dtype}, not a floating dtype"
    if weight.device.type == "meta":
        return "its weight is on the meta device and has no values"
    if min(weight.shape) < 2:
        return f"its weight {tuple(weight.shape)} has too few directions to preserve and train"
    shared = [owner for owner in owners[id(weight)] if owner != f"{name}.weight"]
    if shared:
        return f"its weight is shared with {shared[0]}"
    return None


def _why_not(module: nn.Module, parameter: str, head: nn.Module | None) -> str:
    if module is head:
        return "output embedding"
    if not isinstance(module, nn.Linear):
        return f"{type(module).__name__}: only linear layers are sculpted"
    if parameter == "bias":
        return "bias: only matrices are sculpted"
    return "not in target_modules"


def _output_embedding(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None


def _owners(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    return owners


def _linear_suffixes(model: nn.Module) -> str:
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return ", ".join(sorted({name.rpartition(".")[2] for name in linears})) or "nothing"
