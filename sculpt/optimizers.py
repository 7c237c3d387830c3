"""What an optimizer holds."""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import Optimizer


def held_by(optimizer: Optimizer) -> list[Any]:
    """The parameters of all its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]
