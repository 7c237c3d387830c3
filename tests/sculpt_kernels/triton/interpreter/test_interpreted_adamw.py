"""The fused projected AdamW step against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import FORMS, LAYOUTS, Framed, error, orthonormal, sides, use_tiles
from torch import Tensor

from sculpt_kernels import reference
from sculpt_kernels.adamw.triton import project_adamw_
from sculpt_kernels.rounding import stochastic_round
from sculpt_kernels.triton.tiles import TileConfig

pytestmark = pytest.mark.usefixtures("small_tiles")

SCALARS: dict[str, Any] = {
    "lr": 0.1,
    "betas": (0.9, 0.999),
    "eps": 1e-3,
    "weight_decay": 0.2,
    "step": 7,
}


def truth(
    W: Tensor, G: Tensor, first: Tensor, second: Tensor, U: Tensor, V: Tensor,
    form: str, project: str, *, lr: float, betas: tuple[float, float], eps: float,
    weight_decay: float, step: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    W, G, first, second, U, V = (X.double() for X in (W, G, first, second, U, V))
    if project == "gradient":
        G = reference.project(G, U, V, form)
    first = betas[0] * first + (1 - betas[0]) * G
    second = betas[1] * second + (1 - betas[1]) * G * G
    root = (second / (1 - betas[1] ** step)).sqrt()
    direction = first / (1 - betas[0] ** step) / (root + eps)
    if project == "gradient":
        return W * (1 - lr * weight_decay) - lr * direction, first, second
    return W - lr * reference.project(direction + weight_decay * W, U, V, form), first, second


def operands(dtype: torch.dtype, layout: str = "rows", state: torch.dtype = torch.float32) -> Any:
    W, G, first, second = (torch.randn(2, 50, 41) for _ in range(4))
    framed = [
        Framed(W.to(state), layout),
        Framed(G.to(dtype), layout),
        Framed((0.1 * first).to(state), layout),
        Framed(second.square().to(state), layout),
    ]
    return framed, orthonormal(2, 50, 5, dtype=dtype), orthonormal(41, 9, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("project", ["update", "gradient"])
def test_step(project: str, form: str, dtype: torch.dtype) -> None:
    framed, U, V = operands(dtype)
    W, G, first, second = (frame.tensor for frame in framed)
    before, gradient = W.clone(), G.clone()
    want = truth(W, G, first, second, U, V, form, project, **SCALARS)
    options = {"form": form, "project": project, **SCALARS}
    result = project_adamw_(W, G, first, second, *sides(form, U, V), **options)
    assert result is W
    moved = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert error(W - before, want[0] - before) < moved
    moments = 1e-6 if project == "update" or dtype == torch.float32 else moved
    assert error(first, want[1]) < moments
    assert error(second, want[2]) < moments
    assert torch.equal(G, gradient)
    for frame in framed:
        frame.check_frame()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("subtiles", [1, 2, 4, 8])
def test_layouts_and_parts_of_the_epilogue(
    layout: str, subtiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    framed, U, V = operands(torch.float32, layout)
    W, G, first, second = (frame.tensor for frame in framed)
    # One operand laid out unlike the others.
    odd = Framed(second.clone(), "strided")
    copy = Framed(torch.zeros(2, 50, 41).half(), layout)
    want = truth(W, G, first, second, U, V, "strict", "gradient", **SCALARS)
    use_tiles(monkeypatch, adamw_both=TileConfig(32, 128, 16, 4, 2, subtiles=subtiles))
    options = {"form": "strict", "project": "gradient", **SCALARS}
    project_adamw_(W, G, first, odd.tensor, U, V, copy=copy.tensor, **options)
    for result, truth_ in zip((W, first, odd.tensor), want, strict=True):
        assert error(result, truth_) < 1e-6
    assert error(copy.tensor, want[0]) < 8e-4
    for frame in (*framed, odd, copy):
        frame.check_frame()


@pytest.mark.parametrize("project", ["update", "gradient"])
def test_scalars_on_the_device(project: str) -> None:
    framed, U, V = operands(torch.float32)
    tensors = [frame.tensor for frame in framed]
    want = truth(*tensors, U, V, "core", project, **SCALARS | {"step": 100000})
    on_device = {
        "lr": torch.tensor(0.1),
        "betas": (torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.999, dtype=torch.float64)),
        "eps": torch.tensor(1e-3),
        "weight_decay": torch.tensor(0.2),
        "step": torch.tensor(100000.0),
    }
    project_adamw_(*tensors, U, V, form="core", project=project, **on_device)
    for result, truth_ in zip((tensors[0], *tensors[2:]), want, strict=True):
        assert error(result, truth_) < 2e-6


@pytest.mark.parametrize("project", ["update", "gradient"])
def test_no_ranks_are_plain_adamw(project: str) -> None:
    framed, U, V = operands(torch.float32)
    tensors = [frame.tensor.clone() for frame in framed]
    parameter = torch.nn.Parameter(tensors[0].clone())
    optimizer = torch.optim.AdamW([parameter], lr=0.1, eps=1e-3, weight_decay=0.2)
    parameter.grad = tensors[1].clone()
    optimizer.state[parameter] = {
        "step": torch.tensor(6.0), "exp_avg": tensors[2].clone(), "exp_avg_sq": tensors[3].clone()
    }  # fmt: skip
    optimizer.step()
    options = {"form": "strict", "project": project, **SCALARS}
    project_adamw_(*tensors, U[..., :0], V[..., :0], **options)
    # Decay inside the step is decay beside it, where nothing is projected.
    assert error(tensors[0], parameter.detach().double()) < 1e-6


def test_the_copy_is_rounded_like_everything_else() -> None:
    framed, U, V = operands(torch.float32)
    tensors = [frame.tensor for frame in framed]
    copy = torch.zeros(2, 50, 41, dtype=torch.bfloat16)
    options = {"form": "core", "project": "update", **SCALARS}
    project_adamw_(*tensors, U, V, copy=copy, rounding="stochastic", seed=3, **options)
    want = stochastic_round(tensors[0].reshape(-1, 41), torch.bfloat16, 3).view_as(copy)
    assert torch.equal(copy, want)


def test_state_in_low_precision() -> None:
    framed, U, V = operands(torch.float16, state=torch.float16)
    tensors = [frame.tensor for frame in framed]
    want = truth(*tensors, U, V, "strict", "gradient", **SCALARS)
    project_adamw_(*tensors, U, V, form="strict", project="gradient", **SCALARS)
    for result, truth_ in zip((tensors[0], *tensors[2:]), want, strict=True):
        assert error(result, truth_) < 1e-3
