"""Operations on divided matrices, against the reference on the whole, in float64."""

from __future__ import annotations

import sys
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

sys.path.insert(1, str(Path(__file__).parents[2] / "sculpt" / "distributed"))

from launch import launch

from sculpt_kernels import (
    compress,
    expand_add_,
    expand_add_many_,
    orthonormalize,
    project,
    project_,
    reference,
)

SHAPES = [(7, 5), (5, 7), (2, 9), (9, 1), (6, 6)]
COMPLEMENTS = {
    "core": ("none", "left", "right", "both"),
    "strict": ("none", "left", "right", "both"),
    "left": ("none", "left"),
    "right": ("none", "right"),
}


def operands(shape, ranks, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    m, n = shape[-2:]
    r, s = min(ranks[0], m), min(ranks[1], n)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    G = draw(*shape).to(dtype)
    U, V = (orthonormalize(draw(*shape[:-2], k, c)).to(dtype) for k, c in ((m, r), (n, s)))
    return G, U, V, draw(*shape[:-2], r, s).to(dtype)


def whole(form, complement, G, U, V):
    """By the definition, with projectors written out."""
    G, U, V = G.double(), U.double(), V.double()
    left, right = U @ U.mT, V @ V.mT
    if complement in ("left", "both"):
        left = torch.eye(len(left), dtype=left.dtype) - left
    if complement in ("right", "both"):
        right = torch.eye(len(right), dtype=right.dtype) - right
    if form == "core":
        return G - left @ G @ right
    if form != "right":
        G = G - left @ G
    return G if form == "left" else G - G @ right


def shard(mesh, X, dim):
    """The part of `X`, which all have, that belongs here."""
    return distribute_tensor(X, mesh, [Shard(dim)], src_data_rank=None)


def distance(X, expected):
    """The largest error of the part that is here: every process looks at its own."""
    here = shard(X.device_mesh, expected, X.placements[0].dim).to_local()
    return float((X.to_local().double() - here).abs().max()) if here.numel() else 0.0


def compare():
    """All forms, both ways to divide, uneven and empty shards; bases whole and divided."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for shape, dim, dtype, split in product(
        SHAPES, (0, 1), (torch.float64, torch.float32, torch.bfloat16), (False, True)
    ):
        for ranks in ((2, 3), (0, 2), (9, 9)):
            G, U, V, C = operands(shape, ranks, dtype)
            here = partial(shard, mesh)
            A, B = (here(U, 0), here(V, 0)) if split else (U, V)
            size = 4 * max(shape) ** 0.5 * torch.finfo(dtype).eps
            for form, complements in COMPLEMENTS.items():
                for complement in complements:
                    left = None if form == "right" else A
                    right = None if form == "left" else B
                    X = here(G.clone(), dim)
                    before = X.to_local().clone()
                    options = {"form": form, "complement": complement}
                    copy = project(X, left, right, **options) if complement == "none" else None
                    assert torch.equal(before, X.to_local())
                    assert project_(X, left, right, **options) is X
                    assert copy is None or torch.equal(copy.to_local(), X.to_local())
                    error = distance(X, whole(form, complement, G, U, V))
                    bound = size * max(1.0, float(G.double().abs().max()))
                    assert error <= bound, (shape, dim, dtype, ranks, form, complement, error)
            X = here(G.clone(), dim)
            found = compress(X, A, B, out_dtype=torch.float64).double()
            expected = U.double().mT @ G.double() @ V.double()
            wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
            assert torch.allclose(found, expected, rtol=0, atol=64 * wide * max(shape))
            for coordinates in (C, here(C, 0)):
                moved, base = here(torch.zeros_like(G), dim), here(G, dim)
                expand_add_(moved, coordinates, A, B, base=base)
                expected = G.double() + U.double() @ C.double() @ V.double().mT
                bound = 8 * size * max(1.0, float(expected.abs().max()))
                assert distance(moved, expected) <= bound


@pytest.mark.parametrize("size", [1, 3])
def test_values(size, tmp_path):
    launch(size, compare, tmp_path)


def stacks_and_rounding():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    G, U, V, C = operands((3, 6, 4), (2, 2), torch.float32)
    for dim in range(3):
        X = distribute_tensor(G.clone(), mesh, [Shard(dim)])
        at = 0 if dim == 0 else 1
        A, B, K = (distribute_tensor(P, mesh, [Shard(at)]) for P in (U, V, C))
        project_(X, A, B, form="strict")
        expected = reference.project(G, U, V, form="strict")
        torch.testing.assert_close(X.full_tensor(), expected, rtol=0, atol=1e-5)
        expand_add_many_([X], [K], [A], [B])
        torch.testing.assert_close(X.full_tensor(), expected + U @ C @ V.mT, rtol=0, atol=1e-5)
    G, U, V, C = operands((64, 32), (8, 8), torch.bfloat16)
    zero = distribute_tensor(torch.zeros_like(G), mesh, [Shard(0)])
    seen = torch.zeros(64, 32)
    for seed in range(200):
        zero.to_local().zero_()
        expand_add_(zero, C.float(), U, V, rounding="stochastic", seed=seed * 1000)
        seen += zero.full_tensor().float()
    exact = U.double() @ C.double() @ V.double().mT
    # Unbiased: the mean of 200 is within a few standard errors, of half a spacing each.
    spacing = exact.abs() * 2.0**-7
    assert ((seen.double() / 200 - exact).abs() <= 5 * spacing / 200**0.5 + 1e-6).all()
    # Shards that are alike are not rounded alike.
    twice = torch.cat([U[:32], U[:32]])
    zero.to_local().zero_()
    expand_add_(zero, C.float(), twice, V, rounding="stochastic", seed=0)
    upper, lower = zero.full_tensor().chunk(2)
    assert not torch.equal(upper, lower)
    other = distribute_tensor(torch.randn(8, 8), mesh, [Replicate()])
    with pytest.raises(ValueError, match=r"G must be divided along one dimension.*Replicate"):
        project_(other, torch.eye(8), torch.eye(8))
    halves = torch.distributed.tensor.DTensor.from_local(torch.ones(8, 8), mesh, [Partial()])
    with pytest.raises(ValueError, match="Partial"):
        project_(halves, torch.eye(8), torch.eye(8))
    with pytest.raises(ValueError, match="a DTensor takes backend 'auto' or 'torch'; got 'native'"):
        project_(zero, U, V, backend="native")
    with pytest.raises(ValueError, match="U must have shape"):
        project_(zero, V, V)
    with pytest.raises(ValueError, match="G requires grad"):
        project_(zero.detach().requires_grad_(), U, V)
    row = torch.zeros(1, 32, dtype=torch.bfloat16)
    repeated = torch.distributed.tensor.DTensor.from_local(row.expand(32, 32), mesh, [Shard(0)])
    with pytest.raises(ValueError, match="G must not be an expanded or overlapping tensor"):
        project_(repeated, U, V)
    with pytest.raises(ValueError, match="W must not be an expanded or overlapping tensor"):
        expand_add_(repeated, C, U, V)
    assert not row.any()
    return True


def test_stacks_rounding_and_refusals(tmp_path):
    assert all(launch(2, stacks_and_rounding, tmp_path))
