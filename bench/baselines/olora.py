"""O-LoRA (Wang et al. 2023): a LoRA for each task, in directions that earlier ones do not use."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bench.baselines.lora import LoRA
from sculpt.data.config import NotNegative
from sculpt.runs.method import Advance, Setting
from sculpt.task.cost import Cost
from sculpt.task.targets import Target


class OLoRA(LoRA):
    """The loss of task `t` gains `λ Σ_{i<t} Σ |A_i A_tᵀ|` for every matrix, `A` being `(r, n)`.

    Absolute values are summed, as in the authors' code; their paper's text squares them. Earlier
    adapters are merged, which is the same model, and their `A_i` kept.
    """

    class Options(LoRA.Options):
        """orthogonality: `λ`, 0.5 as in the paper."""

        orthogonality: NotNegative = 0.5

    def __init__(self, setting: Setting) -> None:
        self._earlier: list[Tensor] = []
        super().__init__(setting)

    def cost(self, target: Target) -> Cost:
        tasks = len(self.setting.names) - 1
        kept = tasks * self.rank(target) * target.shape[-1] * target.parameter.element_size()
        return super().cost(target) + Cost(copies=kept)

    def begin_task(self, task: int, advance: Advance) -> torch.optim.Optimizer:
        optimizer = super().begin_task(task, advance)
        self._current = [factor_a(layer) for layer in self.layers().values()]
        return optimizer

    def add_gradients(self) -> None:
        if self._earlier:
            loss = sum(map(orthogonality, self._earlier, self._current), torch.zeros(()))
            torch.autograd.backward(self.options.orthogonality * loss)

    def end_task(self, task: int) -> None:
        now = [factor.detach().clone() for factor in self._current]
        earlier = self._earlier or [factor[:0] for factor in now]
        self._earlier = [torch.cat(pair) for pair in zip(earlier, now, strict=True)]
        self._current = []
        super().end_task(task)

    def memory(self) -> dict[str, Tensor]:
        names = [target.name for target in self.targets]
        return dict(zip(names, self._earlier, strict=False))

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        if memory:
            device = self.targets[0].parameter.device
            self._earlier = [memory[target.name].to(device) for target in self.targets]


def factor_a(layer: nn.Module) -> nn.Parameter:
    """`A` `(r, n)` of an adapted layer."""
    return layer.get_parameter("lora_A.default.weight")


def orthogonality(earlier: Tensor, current: Tensor) -> Tensor:
    """`Σ |A_i A_tᵀ|`, `earlier` being the `A_i` of all tasks, one below the other."""
    return (earlier @ current.mT).abs().sum()
