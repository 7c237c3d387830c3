"""Nested states as tensors and JSON, without pickle: those of optimizers and of generators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TENSOR, TUPLE, KEYS = "__tensor__", "__tuple__", "__keys__"
PLAIN = (str, int, float, bool, type(None))


def flatten(value: Any, prefix: str = "") -> tuple[Any, dict[str, Tensor]]:
    """`value` with every tensor replaced by its name, and the tensors by name.

    Dictionaries with keys of str or int, lists, tuples, numbers, strings and None may be nested as
    they like. Raises `TypeError` for anything else, naming its place.
    """
    tensors: dict[str, Tensor] = {}
    return _flatten(value, prefix or "state", tensors), tensors


def unflatten(layout: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `flatten`, with the layout as JSON gives it back."""
    if isinstance(layout, list):
        return [unflatten(item, tensors) for item in layout]
    if not isinstance(layout, dict):
        return layout
    if TENSOR in layout:
        return tensors[layout[TENSOR]]
    if TUPLE in layout:
        return tuple(unflatten(item, tensors) for item in layout[TUPLE])
    return {key: unflatten(item, tensors) for key, item in layout[KEYS]}


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {TENSOR: name}
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
        # Pairs, since the keys of a JSON object are strings.
        return {KEYS: [[k, _flatten(item, f"{name}.{k}", tensors)] for k, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_flatten(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {TUPLE: items}
    raise TypeError(f"{name} is a {type(value).__name__}, which cannot be written as JSON")


def random_states() -> dict[str, Tensor]:
    """States of all generators that models and data use: torch, CUDA, Python, NumPy."""
    import random

    import numpy as np

    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the global one
    assert version == 3, "the layout of Python's generator has changed"
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy.position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy.gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"cuda.{index}"] = state
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    """Put all generators where `random_states` found them."""
    import random

    import numpy as np

    torch.set_rng_state(states["torch"])
    gauss = states["python.gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = states["numpy.position"].tolist()
    keys = states["numpy"].numpy().astype(np.uint32)
    cached = float(states["numpy.gauss"][0])
    np.random.set_state(("MT19937", keys, position, has_gauss, cached))  # noqa: NPY002
    cuda = [states[name] for name in sorted(states) if name.startswith("cuda.")]
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
