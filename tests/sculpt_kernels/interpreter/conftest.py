"""Collected only where Triton interprets; see `test_interpreter.py` one folder up."""

import os

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(1234)
