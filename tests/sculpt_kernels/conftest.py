"""The native library, or a skip that says why there is none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sculpt_kernels import native


@pytest.fixture
def library() -> native.Library:
    reason = native.missing()
    if reason is not None:
        pytest.skip(reason)
    return native.library()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
