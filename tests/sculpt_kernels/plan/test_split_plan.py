"""plan_split: against what runs, and what it says of a 7B model."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sculpt_kernels import plan_split, split
from sculpt_kernels.plan.devices import DEVICES
from sculpt_kernels.plan.splits import choose_method, subspace_cost
from sculpt_kernels.subspaces import spectral

# Weight matrices of LLaMA-2-7B: q, k, v, o; gate, up and down.
LLAMA_7B = {(4096, 4096): 128, (11008, 4096): 64, (4096, 11008): 32}


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("direct", [640, 48])
@pytest.mark.parametrize(("count", "leading"), [(100, False), (300, True), (200, True)])
def test_products_of_an_invariant_subspace_are_those_that_run(monkeypatch, direct, count, leading):
    monkeypatch.setattr(spectral, "DIRECT", direct)
    W = torch.randn(400, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    S = W @ W.T
    ran = counted(lambda: spectral.invariant_subspace(S, count, leading, 0))
    planned = subspace_cost(400, count, leading, DEVICES["cpu"]).flops
    # The counter sees products only, the plan also triangular solves and factors.
    assert 0.98 * ran <= planned <= 1.25 * ran


@pytest.mark.parametrize("part", ["low", "high"])
@pytest.mark.parametrize(("method", "slack"), [("gram", 1.6), ("spectral", 1.3)])
def test_products_of_a_split_are_those_that_run(method, slack, part):
    W = torch.randn(300, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ran = counted(lambda: split(W, rank=225, part=part, method=method))
    planned = plan_split((300, 500), 225, part=part, device="cpu").flops[method]
    assert 0.95 * ran <= planned <= slack * ran


def test_costs_of_a_shape_its_transpose_and_many():
    one = plan_split((4096, 11008), 3072, device="H100")
    turned = plan_split((2, 11008, 4096), 3072, count=3, device="H100")
    assert turned.seconds == {name: 3 * value for name, value in one.seconds.items()}
    assert one.speedup == one.seconds["svd"] / one.seconds[one.method]
    assert plan_split((64, 64), 64, device="H100").seconds["spectral"] > 0
    assert plan_split((64, 64), 0, device="H100").seconds["range"] == 0


def test_a_7b_model_is_predicted_to_take_less_than_a_minute():
    for rank in (2048, 3072, 3584):
        plans = [
            plan_split(shape, rank, count=count, device="H100") for shape, count in LLAMA_7B.items()
        ]
        assert sum(plan.seconds["spectral"] for plan in plans) < 60
        assert {plan.method for plan in plans} == {"spectral"}


def test_auto_is_gram_on_cpu_and_products_on_a_gpu_where_matrices_are_large():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for k in (16, 64, 256, 1024, 4096):
        for rank in (0, k // 8, k // 2, k, None):
            for part in ("low", "high"):
                for dtype in (torch.float32, torch.float64):
                    assert choose_method((k, 2 * k), rank, part, dtype, cpu) == "gram"
    assert choose_method((256, 256), 128, "low", torch.float32, cuda) == "gram"
    assert choose_method((4096, 11008), 3072, "low", torch.float64, cuda) == "spectral"
    assert choose_method((4096, 11008), None, "low", torch.float64, cuda) == "spectral"


def test_it_reads_as_a_sentence():
    text = str(plan_split((4096, 11008), 3072, count=32, device="H100"))
    assert text.startswith(
        "Splitting 32 matrices of 4096 x 11008 (float64) at rank 3072 on H100 is"
    )
    assert " s by spectral (svd " in text
    assert "gram " in text


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"shape": (4,)}, ValueError, "sizes > 0"),
        ({"shape": (4, 0)}, ValueError, "sizes > 0"),
        ({"rank": 5}, ValueError, "got 5"),
        ({"part": "both"}, ValueError, "'low', 'high'"),
        ({"count": 0}, ValueError, "at least 1"),
        ({"dtype": torch.int32}, TypeError, "floating"),
        ({"device": "TPU"}, ValueError, "H100"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"shape": (4, 6), "rank": 2, **change}
    with pytest.raises(error, match=message):
        plan_split(arguments.pop("shape"), arguments.pop("rank"), **arguments)
