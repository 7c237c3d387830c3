"""Collected only where Triton interprets; see `test_interpreter.py` one folder up."""

import os

import pytest
import torch
from kernel_cases import ROWS, TILE, use_tiles

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(1234)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("reduce", "update", "adamw", "adamw_both", "sketch")
    use_tiles(monkeypatch, apply=ROWS, apply_both=ROWS, **dict.fromkeys(names, TILE))


@pytest.fixture(autouse=True)
def scalars_of_one_element(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 takes `int` of an array of one element, which numpy 2.4 refuses; 3.9 does not."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
