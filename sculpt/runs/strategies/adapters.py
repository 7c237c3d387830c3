"""LoRA and OSF as the `peft` library does them: one adapter for each task, merged at its end."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sculpt.runs.directory import RunError
from sculpt.runs.method import Advance, Begun, Cost, Setting, Strategy, begun, freeze
from sculpt.runs.methods import LoraConfig
from sculpt.runs.strategies import budget
from sculpt.task.targets import Target

FILE = "adapter.safetensors"
RANK = 16
"""Of LoRA, where nothing is said."""


class Adapter(Strategy):
    """What both share. The weights under an adapter stay as they were until it is merged.

    Raises `RunError` without `peft`, and `ValueError` for a matrix that it has no adapter for.
    """

    kinds: tuple[str, ...] = ("Linear",)
    shares_fixed = False

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        check_peft(self.config.method)
        for target in self.targets:
            kind = type(target.places[0].module).__name__
            if kind not in self.kinds or len(target.places) > 1:
                what = "a tied weight" if len(target.places) > 1 else f"a {kind}"
                raise ValueError(
                    f"method={self.config.method!r} trains {' and '.join(self.kinds)} layers of "
                    f"their own; {target.name!r} is {what}: leave it out by sculpt.exclude_modules"
                )
        self.model.requires_grad_(False)
        self._adapted: Any = None
        self.budget = budget.describe(self)

    @abstractmethod
    def peft_config(self) -> Any:
        """Of an adapter over all targets."""

    def begin_task(self, task: int, advance: Advance) -> Begun:
        import peft

        self._adapted = peft.get_peft_model(self.model, self.peft_config())
        return begun(
            [p for p in self.model.parameters() if p.requires_grad], self.free, self.config
        )

    def save(self, folder: Path, previous: Path | None) -> None:
        from safetensors.torch import save_file

        folder.mkdir()
        tensors = {name: value.detach().contiguous() for name, value in self._own().items()}
        save_file(tensors, folder / FILE)

    def weights_follow(self) -> bool:
        return not self.free

    @torch.no_grad()
    def resume_task(self, task: int, folder: Path) -> Begun:
        """The library makes the adapter anew; then all its tensors are those that were saved."""
        from safetensors.torch import load_file

        found = self.begin_task(task, lambda done, total: None)
        saved = load_file(folder / FILE)
        for name, value in self._own().items():
            value.copy_(saved[name])
        return found

    def end_task(self, task: int) -> None:
        self._adapted.merge_and_unload()
        self._adapted = None
        freeze([*self.model.parameters()])

    def plain_state(self) -> Mapping[str, Tensor]:
        own = self._own()
        return {
            name.replace(".base_layer.", "."): value
            for name, value in self.model.state_dict().items()
            if name not in own
        }

    def layers(self) -> dict[str, nn.Module]:
        """The adapted layers of the running task, by the name of their matrix."""
        return {target.name: self.model.get_submodule(target.name) for target in self.targets}

    def _own(self) -> dict[str, Tensor]:
        """Parameters and buffers of the adapters."""
        if self._adapted is None:
            return {}
        return {
            f"{name}.{key}": value
            for name, layer in self.layers().items()
            for key, value in (*layer.named_parameters(), *layer.named_buffers())
            if not key.startswith("base_layer.")
        }

    def _for_each(self, value: Any) -> dict[str, Any]:
        """Patterns that match one matrix each, with `value` of it."""
        return {f"^{re.escape(target.name)}$": value(target) for target in self.targets}


class Lora(Adapter):
    """LoRA (Hu et al. 2021): `W + s B A` with `B` `(m, r)` zero at first, and `W` frozen."""

    kinds = ("Linear", "Conv1D")

    @property
    def options(self) -> LoraConfig:
        return self.config.lora or LoraConfig()

    def rank(self, target: Target) -> int:
        if self.config.budget == "match":
            return budget.lora_rank(target, self.config.sculpt)
        return min(self.options.rank or RANK, *target.shape)

    def cost(self, target: Target) -> Cost:
        rank = self.rank(target)
        return replace(Cost.factored(target, rank, rank * sum(target.shape)), preserved=0)

    def peft_config(self) -> Any:
        import peft

        ranks = self._for_each(self.rank)
        return peft.LoraConfig(
            target_modules=[target.name for target in self.targets],
            rank_pattern=ranks,
            alpha_pattern={name: self.options.scaling * rank for name, rank in ranks.items()},
            fan_in_fan_out=any(target.places[0].transposed for target in self.targets),
            lora_dropout=0.0,
        )


class Osf(Adapter):
    """PEFT's OSF: trailing singular triplets train, their gradients are projected.

    The adapter's tensors are saved, but `peft` decomposes every weight again on the way.
    """

    def rank(self, target: Target) -> int:
        if self.config.budget == "match":
            return budget.osf_rank(target, self.config.sculpt)
        return target.trainable_rank

    def cost(self, target: Target) -> Cost:
        m, n = target.shape
        rank = self.rank(target)
        trained = rank * (m + n + 1)
        # The values before the task, and leading vectors of the longer side.
        held = trained + (max(m, n) * (min(m, n) - rank) if m != n else 0)
        return Cost.factored(target, rank, trained, held * target.parameter.element_size())

    def peft_config(self) -> Any:
        import peft

        return peft.OSFConfig(
            target_modules=[target.name for target in self.targets],
            rank_pattern=self._for_each(lambda target: min(target.shape) - self.rank(target)),
        )


def check_peft(method: str) -> None:
    """Raises `RunError`, saying what to install, where the library is not there."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise RunError(
            f"method={method!r}: peft is not installed: pip install 'sculpt-kernels[peft]'"
        ) from error
