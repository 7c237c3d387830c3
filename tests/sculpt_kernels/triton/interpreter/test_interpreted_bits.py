"""The same seed gives the same bits in torch, in the native kernels and in Triton's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sculpt_kernels import expand_add_, native

BACKENDS = ("torch", "native", "triton")


def whole(*shape: int) -> Tensor:
    """Small integers: every order of summation gives the same float32 total."""
    return torch.randint(-3, 4, shape).float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", [0, 7, 2**40 + 1, 2**63 + 11, -5])
def test_stochastic_rounding_on_three_backends(
    seed: int, dtype: torch.dtype, library: native.Library
) -> None:
    for batch in ((), (2, 3)):
        W = (torch.randn(*batch, 37, 45) * 8).round().div(8).to(dtype)
        U, V, C = whole(*batch, 37, 4), whole(*batch, 45, 6), whole(*batch, 4, 6) / 2**13
        options = {"rounding": "stochastic", "seed": seed}
        found = [expand_add_(W.clone(), C, U, V, backend=name, **options) for name in BACKENDS]
        for other in found[1:]:
            assert torch.equal(found[0].view(torch.int16), other.view(torch.int16))
        assert not torch.equal(found[0], expand_add_(W.clone(), C, U, V, backend="torch"))
