"""What an inspection says of protecting a task, against the real thing."""

from __future__ import annotations

import pytest
import torch
from tiny_language import tiny_model

from sculpt import SculptConfig, Sculptor
from sculpt.curvature import directions
from sculpt.curvature.factors import Full
from sculpt.inspection.estimate import inspect_model
from sculpt.inspection.trace import counted

ROWS, TOKENS = 8, 32


@pytest.mark.parametrize("options", [{}, {"factor_bytes": 90_000, "sketch_rank": 8}], ids=str)
def test_bytes_and_flops_are_those_of_the_pass(options: dict[str, int]) -> None:
    model = tiny_model()
    model.config.architectures = [type(model).__name__]
    config = SculptConfig(**options)
    found = inspect_model(model.config, config, tokens=ROWS * TOKENS, sequence=TOKENS).statistics
    assert found is not None
    assert (found.sketches > 0) == bool(options)
    ids = torch.zeros(ROWS, TOKENS, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids}
    sculptor = Sculptor(model, config)
    with counted(model, batch.values()) as (counter, live):
        sculptor.protect([batch])
        flops, peak = counter.get_total_flops(), live.peak
    factors = sculptor.memory.factors.values()
    assert found.factors == len(factors)
    assert found.bytes == sum(t.nbytes for f in factors for t in f.tensors().values())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert found.peak == pytest.approx(weights + peak, rel=0.1)
    assert found.flops == pytest.approx(flops, rel=0.01)
    assert "to protect a task: statistics of" in str(inspect_model(model.config, config))


def test_nothing_is_said_where_nothing_is_protected() -> None:
    config = SculptConfig(subspaces="weights")
    assert inspect_model(tiny_model().config, config).statistics is None


def test_products_of_choosing_directions_are_counted() -> None:
    generator = torch.Generator().manual_seed(0)
    X, Y = (torch.randn(400, 96, generator=generator) for _ in range(2))
    old, new = (Full(x.mT @ x, torch.tensor(400.0)) for x in (X, Y))
    model = torch.nn.Linear(1, 1)
    with counted(model, []) as (counter, _):
        directions.by_ratio(old, new, 24)
        products = counter.get_total_flops()
    # The counter sees the products, not the Cholesky factors and what is solved with them.
    d, p = 96, 40
    solved = d**3 // 3 + directions.ITERATIONS * 2 * d * d * p
    assert directions.flops_of_ratio(old, 24) - solved == pytest.approx(products, rel=0.35)
