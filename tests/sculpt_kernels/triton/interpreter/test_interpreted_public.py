"""The public functions reach the kernels, and give what their torch backend gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import BOUNDS, FORMS, error, orthonormal, sides

import sculpt_kernels
from sculpt_kernels.triton import launcher

LOW = torch.float16


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that ran."""
    names: list[str] = []
    original = launcher.launch

    def launch(kernel: Any, *arguments: Any, **options: Any) -> None:
        names.append(kernel.fn.__name__)
        original(kernel, *arguments, **options)

    monkeypatch.setattr(launcher, "launch", launch)
    return names


@pytest.mark.parametrize("form", FORMS)
def test_project(form: str, launched: list[str]) -> None:
    G = torch.randn(140, 150).to(LOW)
    left, right = sides(form, orthonormal(140, 4, dtype=LOW), orthonormal(150, 4, dtype=LOW))
    ours = sculpt_kernels.project(G, left, right, form=form, backend="triton")
    assert launched == ["reduce_kernel", "apply_kernel"]
    theirs = sculpt_kernels.project(G, left, right, form=form, backend="torch")
    assert error(ours, theirs.double()) < BOUNDS[LOW]


def test_what_the_kernels_do_not_take() -> None:
    G, B = torch.randn(256, 256), torch.randn(256, 129)
    with pytest.raises(RuntimeError, match="up to 128; got 129"):
        sculpt_kernels.project(G, None, B, form="right", backend="triton")
    with pytest.raises(RuntimeError, match="no complement='left'"):
        sculpt_kernels.project(G, B, B, complement="left", backend="triton")
    with pytest.raises(RuntimeError, match="no float64"):
        sculpt_kernels.project(G.double(), None, B.double()[:, :3], form="right", backend="triton")
    with pytest.raises(RuntimeError, match="up to 128"):
        sculpt_kernels.compress(G, B, B, backend="triton")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("r", "s"), [(0, 0), (0, 3), (3, 0)])
def test_sides_of_rank_zero(form: str, r: int, s: int) -> None:
    G = torch.randn(24, 31)
    U, V = orthonormal(24, r, dtype=G.dtype), orthonormal(31, s, dtype=G.dtype)
    left, right = sides(form, U, V)
    want = sculpt_kernels.project(G, left, right, form=form, backend="torch")
    many = [G.clone(), G.clone()]
    sculpt_kernels.project_many_(many, [left] * 2, [right] * 2, form=form, backend="triton")
    for got in (sculpt_kernels.project(G, left, right, form=form, backend="triton"), *many):
        assert (got - want).norm() < BOUNDS[G.dtype] * G.norm()


@pytest.mark.parametrize("form", FORMS)
def test_project_many(form: str, launched: list[str]) -> None:
    Gs = [torch.randn(24, 32).to(LOW) for _ in range(3)]
    Us, Vs = ([orthonormal(k, 3, dtype=LOW).contiguous() for _ in Gs] for k in (24, 32))
    lefts, rights = zip(*(sides(form, U, V) for U, V in zip(Us, Vs, strict=True)), strict=True)
    ours, theirs = [G.clone() for G in Gs], [G.clone() for G in Gs]
    sculpt_kernels.project_many_(ours, lefts, rights, form=form, backend="triton")
    assert launched == ["reduce_kernel", "apply_kernel"]
    sculpt_kernels.project_many_(theirs, lefts, rights, form=form, backend="torch")
    for a, b in zip(ours, theirs, strict=True):
        assert error(a, b.double()) < BOUNDS[LOW]


def test_coordinates(launched: list[str]) -> None:
    G, U, V = torch.randn(24, 32), orthonormal(24, 3, dtype=torch.float32), torch.eye(32)[:, :5]
    ours = sculpt_kernels.compress(G, U, V, backend="triton")
    assert error(ours, sculpt_kernels.compress(G, U, V, backend="torch").double()) < 1e-6
    W = torch.randn(24, 32).to(torch.bfloat16)
    U, V = U.to(W.dtype), V.to(W.dtype)
    options: dict[str, Any] = {"alpha": 0.3, "rounding": "stochastic", "seed": 2**40 + 3}
    updated = [
        sculpt_kernels.expand_add_(W.clone(), ours, U, V, backend=backend, **options)
        for backend in ("triton", "torch")
    ]
    assert launched == ["reduce_kernel", "update_kernel", "update_kernel"]
    assert (updated[0] != updated[1]).sum() <= 1


@pytest.mark.parametrize("project", ["update", "gradient"])
def test_adamw(project: str, launched: list[str]) -> None:
    W, G, U, V = (
        torch.randn(24, 32),
        torch.randn(24, 32),
        orthonormal(24, 3, dtype=torch.float32),
        orthonormal(32, 5, dtype=torch.float32),
    )
    options: dict[str, Any] = {
        "form": "strict", "project": project, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-3,
        "weight_decay": 0.1, "step": 2,
    }  # fmt: skip
    results = []
    for backend in ("triton", "torch"):
        state = [W.clone(), G.clone(), torch.full_like(W, 0.1), torch.full_like(W, 0.2)]
        sculpt_kernels.project_adamw_(*state, U, V, backend=backend, **options)
        results.append(state)
    assert launched == (["direction_kernel"] if project == "update" else []) + ["step_kernel"]
    for a, b in zip(*results, strict=True):
        assert error(a, b.double()) < 1e-5
