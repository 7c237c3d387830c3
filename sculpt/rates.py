"""Learning rates of dense weights in an optimizer that knows nothing of coordinates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer


def convert_rates(optimizer: Optimizer, factors: Mapping[nn.Parameter, float]) -> list[Any]:
    """From now on each step moves a parameter at its group's rate times its factor.

    The groups are split for the length of a step only. In between they are those that the
    optimizer was made with, so that schedulers, checkpoints and logs see dense rates and no
    others.

    Returns:
        Handles; `remove()` ends it.
    """
    whole: list[dict[str, Any]] = []

    def split(*_: Any) -> None:
        whole[:] = optimizer.param_groups
        parts = []
        for group in whole:
            by_factor: dict[float, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                by_factor.setdefault(factors.get(parameter, 1.0), []).append(parameter)
            for factor, parameters in by_factor.items():
                parts.append({**group, "params": parameters, "lr": group["lr"] * factor})
        optimizer.param_groups[:] = parts

    def join(*_: Any) -> None:
        optimizer.param_groups[:] = whole

    return [
        optimizer.register_step_pre_hook(split),
        optimizer.register_step_post_hook(join),
    ]
