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
    chosen: list[Target] = []
    left_out: dict[str, str] = {}
    head = _output_embedding(model)
    owners = _owners(model)
    matched_any = False
    for name, module in model.named_modules():
        wanted, by_name = _is_wanted(name, module, config.target_modules, head)
        reason = _refusal(name, module, owners)
        if wanted and reason is None:
            assert isinstance(module, nn.Linear)
            shape = (module.out_features, module.in_features)
            chosen.append(Target(name, module, preserved_rank(name, shape, config)))
        elif wanted and by_name:
            raise ValueError(
                f"target_modules={config.target_modules!r} matches {name!r}, which cannot be "
                f"sculpted: {reason}"
            )
        for parameter in module._parameters:
            full = f"{name}.{parameter}" if name else parameter
            if module._parameters[parameter] is None or (chosen and chosen[-1].module is module):
                continue
            left_out[full] = _why_not(module, head, wanted, reason)
        matched_any = matched_any or wanted
    for target in chosen:
        if target.module.bias is not None:
            left_out[f"{target.name}.bias"] = "bias: only matrices are sculpted"
    if not chosen:
        raise ValueError(_nothing_matched(model, config, left_out if matched_any else {}))
    return Targets(chosen, left_out)


def _is_wanted(
    name: str, module: nn.Module, targets: object, head: nn.Module | None
) -> tuple[bool, bool]:
    """Whether the module is asked for, and whether it was asked for by its name."""
    if targets == "all-linear":
        linear_like = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        return linear_like and module is not head, False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None, True
    assert isinstance(targets, list | tuple)
    return any(name == t or name.endswith(f".{t}") for t in targets), True


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


def _why_not(module: nn.Module, head: nn.Module | None, wanted: bool, reason: str | None) -> str:
    if module is head:
        return "output embedding"
    if wanted and reason is not None:
        return reason
    if isinstance(module, nn.Linear):
        return "not in target_modules"
    return f"{type(module).__name__}: only linear layers are sculpted"


def _output_embedding(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None


def _owners(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    return owners


def _nothing_matched(model: nn.Module, config: SculptConfig, refused: dict[str, str]) -> str:
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in linears})
    message = f"target_modules={config.target_modules!r} matches no matrix that can be sculpted"
    if refused:
        name, reason = next(iter(refused.items()))
        return f"{message}: {name}: {reason}"
    return f"{message}; the model's linear layers end in {', '.join(suffixes) or 'nothing'}"
