"""Splits of the weights of real models: as good as an exact SVD, by the figures that count."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from sculpt.demo.models import minilm, smollm2
from sculpt_kernels import split

MATRICES = [
    (smollm2, "model.layers.2.self_attn.k_proj.weight"),
    (smollm2, "model.layers.14.self_attn.q_proj.weight"),
    (smollm2, "model.layers.29.mlp.down_proj.weight"),
    (minilm, "encoder.layer.3.attention.self.query.weight"),
    (minilm, "encoder.layer.0.output.dense.weight"),
]


@pytest.mark.parametrize(("folder", "name"), MATRICES)
def test_optimal_energy_orthonormal_and_complementary(folder, name):
    with safe_open(str(folder() / "model.safetensors"), framework="pt") as file:
        W = file.get_tensor(name).float()
    k = min(W.shape)
    rank = k - k // 4
    squares = torch.linalg.svdvals(W.double()).square()
    for method, dtype in (
        ("gram", torch.float32),
        ("gram", torch.float64),
        ("spectral", torch.float64),
        ("auto", torch.float32),
        ("auto", torch.float64),
    ):
        high, low = (
            split(W.to(dtype), rank=rank, part=part, method=method) for part in ("high", "low")
        )
        assert high.method == low.method == (method if method != "auto" else "gram")
        captured = (high.U.double().T @ W.double() @ high.V.double()).square().sum()
        assert float(captured / squares[:rank].sum()) >= 1 - 1e-6
        left = (low.U.double().T @ W.double() @ low.V.double()).square().sum()
        assert float((left - squares[rank:].sum()) / squares.sum()) <= 1e-6
        bound = 50 * torch.finfo(dtype).eps * rank**0.5
        for B, D in ((high.U, low.U), (high.V, low.V)):
            both = torch.cat([B, D], -1).double()
            assert float((both.T @ both - torch.eye(k, dtype=both.dtype)).abs().max()) <= bound
