"""Both factors against those of another library, `curvlinops`."""

from __future__ import annotations

import pytest
import torch
from curvlinops import KFACLinearOperator
from torch import nn

from tests.sculpt.curvature.oracle import UNIT, collected


@pytest.mark.parametrize("tokens", [(), (5,)], ids=["vectors", "sequences"])
def test_factors_are_those_of_kfac(tokens):
    """The empirical Fisher of the summed log-likelihood, every token a vector of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 4))
    if tokens:
        model.append(nn.Flatten(0, -2))
    X, y = torch.randn(12, *tokens, 6), torch.randint(0, 4, (12 * (tokens[0] if tokens else 1),))
    loss = nn.CrossEntropyLoss(reduction="sum")
    params = [layer.weight for layer in model if isinstance(layer, nn.Linear)]
    oracle = KFACLinearOperator(
        model, loss, params, [(X, y)], fisher_type="empirical", check_deterministic=False
    )
    oracle.compute_kronecker_factors()
    memory = collected(model, [lambda model: loss(model(X), y)])
    vectors = len(y)
    for name, S in oracle._gradient_covariances.items():
        A = oracle._input_covariances[name] * vectors  # They are means over vectors.
        for ours, theirs in zip(memory.of(name), (S, A), strict=True):
            # Two float32 sums of that many products, of vectors found by float32 layers.
            limit = 2 * (vectors + 30) * UNIT * theirs.diagonal().max()
            assert (ours.total - theirs).abs().max() <= limit
            assert theirs.abs().max() > 0
    assert set(oracle._gradient_covariances) == set(memory.sides) == {"0", "2", "4"}
