"""The native library rounds as torch does, bit for bit, and is taken where it is faster."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from matrices import basis, gaussian
from torch import Tensor

from sculpt_kernels import compress, expand_add_, expand_add_many_, native, project_, project_adamw_
from sculpt_kernels.rounding import stochastic_round

pytestmark = pytest.mark.usefixtures("library")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("seed", [0, 2**63 + 11, -5, torch.tensor(2**40)], ids=str)
def test_stochastic_rounding_has_the_bits_of_torch(dtype: torch.dtype, seed: int | Tensor) -> None:
    # Ragged, one row, one column, more than one segment of 512 columns.
    for shape in ((37, 45), (1, 5), (7, 1), (3, 1030), (2, 3, 37, 45)):
        *batch, m, n = shape
        W, C = gaussian(*shape, dtype=dtype), gaussian(*batch, 4, 1, dtype=FP32, seed=3)
        U, V = basis(m, 4, dtype=dtype)[:, :4], basis(n, 1, dtype=dtype)
        C = C[..., : U.shape[1], :]
        ours, torchs, nearest = (
            expand_add_(W.clone(), C, U, V, backend=backend, **options)
            for backend, options in (
                ("native", {"rounding": "stochastic", "seed": seed}),
                ("torch", {"rounding": "stochastic", "seed": seed}),
                ("torch", {}),
            )
        )
        assert torch.equal(ours, torchs)
        assert W.numel() < 10 or not torch.equal(ours, nearest)


@pytest.mark.parametrize("target", ["W", "copy"])
@pytest.mark.parametrize("project", ["update", "gradient"])
def test_the_step_is_rounded_stochastically_where_asked(project: str, target: str) -> None:
    W = gaussian(2, 9, 70, dtype=BF16 if target == "W" else FP32)
    G, U, V = gaussian(2, 9, 70, dtype=FP32), basis(9, 2, dtype=FP32), basis(70, 3, dtype=FP32)
    results = []
    for backend in ("native", "torch"):
        w, copy = W.clone(), torch.zeros_like(W, dtype=BF16) if target == "copy" else None
        moments = torch.zeros_like(G), torch.zeros_like(G)
        project_adamw_(
            w, G, *moments, U, V, project=project, lr=2.0**-4, weight_decay=2.0**-4, step=1,
            copy=copy, rounding="stochastic", seed=9, backend=backend,
        )  # fmt: skip
        results.append((w, w if copy is None else copy))
    for ours, torchs in zip(*results, strict=True):
        assert torch.equal(ours, torchs)


def special_values() -> Tensor:
    """All kinds of float32: ties, subnormals of every dtype, both ends, infinities, NaN."""
    generator = torch.Generator().manual_seed(1)
    raw = torch.randint(-(2**31), 2**31, (3000,), generator=generator).to(torch.int32)
    every = torch.arange(2**16, dtype=torch.int32)
    decoded = [every.to(torch.int16).view(dtype).float() for dtype in (BF16, FP16)]
    ties = [x + (x.abs() * 2.0**-9) for x in decoded] + [x + (x.abs() * 2.0**-12) for x in decoded]
    small = torch.linspace(-1e-4, 1e-4, 4001)
    return torch.cat([raw.view(FP32), *decoded, *ties, small, torch.tensor([65519.0, 65520.0])])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("count", [1, 5])
def test_special_values_are_rounded_as_by_torch(dtype: torch.dtype, count: int) -> None:
    torch.set_num_threads(count)
    x = special_values()[None].repeat(7, 1)
    ours = torch.empty_like(x, dtype=dtype)
    native.round_(ours, x, 77, 0)
    torchs = stochastic_round(x, dtype, 77)
    torch.testing.assert_close(ours, torchs, rtol=0, atol=0, equal_nan=True)


def test_moments_in_float64_are_rounded_too() -> None:
    W, G = gaussian(9, 70, dtype=BF16), gaussian(9, 70, dtype=torch.float64)
    U, V = basis(9, 2, dtype=FP32), basis(70, 3, dtype=FP32)
    results = [
        project_adamw_(
            W.clone(), G, G.clone(), G.square(), U, V, lr=0.1, step=1,
            rounding="stochastic", seed=9, backend=backend,
        )
        for backend in ("native", "torch")
    ]  # fmt: skip
    assert torch.equal(*results)


def test_strides_of_every_kind() -> None:
    plain = gaussian(40, 30, dtype=BF16)
    U, V, C = basis(40, 4, dtype=FP32), basis(30, 3, dtype=FP32), gaussian(4, 3, dtype=FP32)
    options: dict[str, Any] = {"rounding": "stochastic", "seed": 4, "backend": "native"}
    want = expand_add_(plain.clone(), C, U, V, **options)
    assert torch.equal(expand_add_(plain.t().contiguous().t(), C, U, V, **options), want)
    buffer = torch.zeros(80, 90, dtype=BF16)
    view = buffer[::2, 1::3]
    before = buffer.clone()
    assert torch.equal(expand_add_(view.copy_(plain), C, U, V, **options), want)
    before[::2, 1::3] = want
    assert torch.equal(buffer, before)


def test_auto_takes_it_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(native, "round_", lambda *_: calls.append(1))
    W, C = gaussian(16, 16, dtype=BF16), gaussian(2, 2, dtype=FP32)
    U, V = basis(16, 2, dtype=BF16), basis(16, 2, dtype=BF16)
    options: dict[str, Any] = {"rounding": "stochastic", "seed": 1}
    expand_add_(W, C, U, V, **options)
    seeds = torch.tensor([1, 2])
    expand_add_many_([W, W.clone()], [C] * 2, [U] * 2, [V] * 2, rounding="stochastic", seeds=seeds)
    state = [torch.zeros(16, 16) for _ in range(4)]
    project_adamw_(*state, U, V, lr=1e-3, step=1, copy=W, **options)
    assert len(calls) == 4
    expand_add_(W, C, U, V)
    expand_add_(W, C, U, V, backend="torch", **options)
    project_adamw_(*state, U, V, lr=1e-3, step=1, copy=W)
    assert len(calls) == 4


def test_it_rounds_stochastically_and_does_nothing_else() -> None:
    W, C = gaussian(16, 16, dtype=FP32), gaussian(2, 2, dtype=FP32)
    U, V = basis(16, 2, dtype=FP32), basis(16, 2, dtype=FP32)
    state = [torch.zeros(16, 16) for _ in range(4)]
    for call in (
        lambda: expand_add_(W, C, U, V, backend="native"),
        lambda: project_adamw_(*state, U, V, lr=1e-3, step=1, backend="native"),
        lambda: project_(W, U, V, backend="native"),
        lambda: compress(W, U, V, backend="native"),
    ):
        with pytest.raises(RuntimeError, match="it rounds stochastically and does nothing else"):
            call()
