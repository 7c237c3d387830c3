"""Which of the vectors that layers read are padding, as far as a model was told."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

IGNORED = -100
"""Labels of tokens that are not learned, as in torch and transformers."""


class Padding:
    """Which vectors of a layer are padding, as far as a model was told."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Nothing is padding."""
        self._mask: Tensor | None = None
        self._of_encoder: Tensor | None = None
        self._of_decoder: Tensor | None = None
        self._encoded: Any = None
        self._index: Tensor | None = None

    def gather(self, index: Tensor) -> None:
        """Vectors are taken out of those of all tokens."""
        self._index = index if self._mask is not None else None

    def kept(self, x: Tensor, shape: torch.Size) -> Tensor | None:
        """A mask of this shape of those of `x` that are none; `None`: all of them."""
        mask = self._of_encoder if x is self._encoded else self._mask
        if mask is None:
            return None
        if shape[:2] == mask.shape:
            return mask.view(*mask.shape, *[1] * (len(shape) - 2)).expand(shape)
        if len(shape) == 1 and shape[0] == mask.numel():
            return mask.flatten()
        if self._index is not None and shape == self._index.shape:
            return mask.flatten()[self._index]
        return None

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Listen to what a model is told; of encoder and decoder each has its own padding."""
        pair = next((m for m in model.modules() if encodes_apart(m)), None)
        hooks = [(model if pair is None else pair, self._note)]
        if pair is not None:
            hooks.append((pair.get_decoder(), self._decode))  # type: ignore[operator]
        with ExitStack() as stack:
            for module, hook in hooks:
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _note(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.clear()
        given = _arguments(module, args, kwargs)
        self._mask = self._of_encoder = _padded(given.get("attention_mask"))
        self._of_decoder = _padded(given.get("decoder_attention_mask"))
        labels = given.get("labels")
        if encodes_apart(module) and self._of_decoder is None and isinstance(labels, Tensor):
            self._of_decoder = _padded(labels != IGNORED)

    def _decode(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._mask = self._of_decoder
        self._encoded = _arguments(module, args, kwargs).get("encoder_hidden_states")


def _padded(mask: Any) -> Tensor | None:
    """A mask `(rows, tokens)` that leaves something out."""
    if not isinstance(mask, Tensor) or mask.ndim != 2 or is_fake(mask):
        return None
    if bool(mask.bool().all()):
        return None
    return mask.bool()


def encodes_apart(module: nn.Module) -> bool:
    """Whether it is an encoder with a decoder, of transformers."""
    config = getattr(module, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and hasattr(module, "get_decoder")


def _arguments(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of a call, by name."""
    try:
        return inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments | kwargs
    except TypeError:
        return kwargs
