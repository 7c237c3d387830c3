"""The benchmark of protecting a task, on a tiny model; it measures nothing."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench import curvature, tables

LARGE = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1}


def test_sketches_beside_exact_factors() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, num_attention_heads=2, num_key_value_heads=2, **LARGE)
    )
    ids = torch.randint(0, 64, (2, 3, 4, 16))
    tasks = tuple([{"input_ids": one, "labels": one} for one in batches] for batches in ids)
    rows = curvature.sketched(model, tasks, [12, 40])
    assert [row["rank"] for row in rows] == [12, 40]
    for row in rows:
        assert row["sketches"] == 11  # inputs of q, k and v, and of gate and up, are shared
        assert 0 < row["captured"]["least"] <= row["captured"]["most"] <= 1 + 1e-5
    few, many = rows
    assert many["captured"]["median"] > few["captured"]["median"]
    assert many["unknown"]["median"] < few["unknown"]["median"]
    assert few["bytes"]["sketch"] < many["bytes"]["sketch"] < many["bytes"]["exact"]
    took = curvature.seconds(model, *tasks)
    assert all(value > 0 for name, value in took.items() if name != "choice")
    content = {
        "model": "tiny", "tokens": 16, "seconds": took, "sketches": rows,
        "machine": {"cpu": "a CPU", "torch": "2", "threads": 1, "date": "today"},
    }  # fmt: skip
    page = tables.curvature({"curvature-tiny.json": content})
    assert "| plain step |" in page
    assert f"{few['captured']['median']:.3g} (" in page
