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


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest, library: native.Library) -> Iterator[str]:
    """Each instruction set that this CPU has."""
    best = library.isa
    try:
        library.use_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    library.use_isa(best)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
