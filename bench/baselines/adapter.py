"""What methods of the `peft` library share: an adapter for each task, merged at its end."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sculpt.runs.directory import RunError
from sculpt.runs.method import Advance, Setting, Strategy, freeze

FILE = "adapter.safetensors"


class Adapter(Strategy):
    """The weights under an adapter stay as they were until it is merged.

    Raises `RunError` without `peft`, and `ValueError` for a matrix that it has no adapter for.
    """

    kinds: tuple[str, ...] = ("Linear",)
    shares_fixed = False

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        method = self.config.method
        try:
            import peft  # noqa: F401
        except ImportError as error:
            raise RunError(f"method={method!r}: peft is not installed: pip install peft") from error
        for target in self.targets:
            kind = type(target.places[0].module).__name__
            if kind not in self.kinds or len(target.places) > 1:
                what = "a tied weight" if len(target.places) > 1 else f"a {kind}"
                raise ValueError(
                    f"method={method!r} trains {' and '.join(self.kinds)} layers of their own; "
                    f"{target.name!r} is {what}: leave it out by sculpt.exclude_modules"
                )
        self.model.requires_grad_(False)
        self._adapted: Any = None

    @abstractmethod
    def peft_config(self) -> Any:
        """Of an adapter over all targets."""

    def begin_task(self, task: int, advance: Advance) -> torch.optim.Optimizer:
        import peft

        self._adapted = peft.get_peft_model(self.model, self.peft_config())
        return self.adamw([p for p in self.model.parameters() if p.requires_grad])

    def save(self, folder: Path, previous: Path | None) -> None:
        folder.mkdir()
        tensors = {name: value.detach().contiguous() for name, value in self._own().items()}
        save_file(tensors, folder / FILE)

    def weights_follow(self) -> bool:
        return not self.free

    @torch.no_grad()
    def resume_task(self, task: int, folder: Path) -> torch.optim.Optimizer:
        """The library makes the adapter anew; then all its tensors are those that were saved."""
        optimizer = super().resume_task(task, folder)
        saved = load_file(folder / FILE)
        for name, value in self._own().items():
            value.copy_(saved[name])
        return optimizer

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

    def for_each(self, value: Any) -> dict[str, Any]:
        """Patterns that match one matrix each, with `value` of it."""
        return {f"^{re.escape(target.name)}$": value(target) for target in self.targets}
