"""Rows that several processes protect together: the sums of one, and the same bits for all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from launch import launch
from small_models import KINDS
from tasks import batch, network, share
from test_shards import divided, shard_blocks

from sculpt import SculptConfig, Sculptor
from sculpt.storage.tensors import read_file

TOKENIZER = SimpleNamespace(bos_token_id=1, eos_token_id=2)
CONFIGS = {
    "full": SculptConfig(),
    # The two longest sides as sketches.
    "sketches": SculptConfig(sketch_rank=4, factor_bytes=5000),
}


@dataclass
class Rows:
    """Their summed loss, as a function of the model."""

    x: torch.Tensor
    y: torch.Tensor

    def __call__(self, model):
        return torch.nn.functional.mse_loss(model(self.x), self.y, reduction="sum")

    def __len__(self):
        return len(self.x)


def parts(task):
    """The rows of this process in two batches; there are 24 of them."""
    x, y = (share(part) for part in batch(task, 0))
    return [Rows(a, b) for a, b in zip(x.chunk(2), y.chunk(2), strict=True)]


def state(sculptor):
    bases = {name: (m.bases.U, m.bases.V) for name, m in sculptor._task.matrices.items()}
    return {
        "sums": {k: f.tensors() for k, f in sculptor.memory.factors.items()},
        "sides": sculptor.memory.sides,
        "rows": sculptor.memory.rows,
        "bases": {
            name: [getattr(side, "full_tensor", side.clone)() for side in pair]
            for name, pair in bases.items()
        },
        "gains": {name: m.bases.gain for name, m in sculptor._task.matrices.items()},
    }


def protect(make, names, folder):
    """Two protected tasks, and the directions of a third one."""
    found = {}
    for name in names:
        sculptor = Sculptor(make(), CONFIGS[name])
        for task in (1, 2):
            sculptor.protect(parts(task), f"task {task}")
        sculptor.begin_task(parts(3))
        found[name] = state(sculptor)
        sculptor.save_memory(folder / name)
    return found


def assert_same_sums(found, alone):
    assert alone["sums"]
    assert found["sides"] == alone["sides"]
    assert found["rows"] == alone["rows"]
    for key, tensors in alone["sums"].items():
        for name, tensor in tensors.items():
            # The same 48 products in another order, of vectors that other batches give.
            limit = 2 * 60 * 2.0**-24 * tensor.abs().max()
            assert (found["sums"][key][name] - tensor).abs().max() <= limit, (key, name)


@pytest.mark.parametrize("make", [network, divided], ids=["whole", "divided"])
def test_sums_and_directions_are_those_of_one_process(make, tmp_path):
    alone = protect(network, CONFIGS, tmp_path / "alone")
    found = launch(2, protect, tmp_path, make, list(CONFIGS), tmp_path / "together")
    for name, expected in alone.items():
        kinds = {len(tensors) for tensors in expected["sums"].values()}
        assert kinds == ({2} if name == "full" else {2, 3})
        one, two = (result[name] for result in found)
        assert_same_sums(one, expected)
        for key, tensors in one["sums"].items():
            for part, tensor in tensors.items():
                assert torch.equal(tensor, two["sums"][key][part])
        assert one["gains"] == two["gains"]
        for target, pair in one["bases"].items():
            for side, other, single in zip(
                pair, two["bases"][target], expected["bases"][target], strict=True
            ):
                assert torch.equal(side, other)
                # The span of one process, as far as eigenvectors follow from rounded sums.
                outside = single - side @ (side.mT @ single)
                assert torch.linalg.matrix_norm(outside, 2) <= 0.02, (name, target)
        saved = read_file(tmp_path / "together" / name / "sculpt_memory.safetensors")
        for key, tensors in one["sums"].items():
            assert torch.equal(saved[f"{key}/total"], tensors["total"])


def experts():
    """Rows of which each process has its own; some experts see none of those of one."""
    model = shard_blocks(KINDS["mixtral experts"].build())
    sculptor = Sculptor(model, SculptConfig())
    ids = torch.randint(1, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    own = share(ids)
    sculptor.protect([{"input_ids": own, "labels": own}])
    sculptor.begin_task([{"input_ids": own, "labels": own}])
    return state(sculptor)


def test_experts_and_labels(tmp_path):
    model = KINDS["mixtral experts"].build()
    sculptor = Sculptor(model, SculptConfig())
    ids = torch.randint(1, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    sculptor.protect([{"input_ids": row[None], "labels": row[None]} for row in ids])
    sculptor.begin_task()
    for found in launch(2, experts, tmp_path):
        assert_same_sums(found, state(sculptor))


def write():
    sculptor = Sculptor(KINDS["linear"].build(), SculptConfig())
    sculptor.protect_generated(TOKENIZER, 100, length=10)
    sculptor.begin_task()
    return state(sculptor)


def test_generated_text_is_shared_out(tmp_path):
    alone = write()
    for found in launch(2, write, tmp_path):
        assert_same_sums(found, alone)


def only_on_one():
    """Layers that only the rows of one process reach, and inputs that only those of one share."""
    torch.manual_seed(0)

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (torch.nn.Linear(6, 6) for _ in range(3))

        def forward(self, x, both, y):
            h = self.a(x) + self.b(x if both else y)
            return (h + self.c(x) if both else h).square().sum()

    x, y = torch.randn(2, 30, 6)
    sculptor = Sculptor(Two(), SculptConfig())
    kinds = [True, False]
    if dist.is_initialized():
        kinds = kinds[dist.get_rank() :][:1]
    for both in kinds:
        sculptor.protect([lambda model, both=both: model(x, both, y)])
    sculptor.begin_task()
    return state(sculptor)


def test_what_only_one_process_reaches(tmp_path):
    alone = only_on_one()
    alone["rows"] = {"": 2}
    one, two = launch(2, only_on_one, tmp_path)
    for found in (one, two):
        assert_same_sums(found, alone)
    for key, tensors in one["sums"].items():
        assert torch.equal(tensors["total"], two["sums"][key]["total"])


def refusals():
    said = []
    rank = dist.get_rank()
    x = torch.ones(2, 13)

    def loss(model, factor=1.0):
        return model(x).square().sum() * factor

    bad = partial(loss, factor=torch.nan if rank else 1.0)
    cases = [[bad], [loss, {"input": x}] if rank else [loss, loss], [loss] * (1 + rank)]
    # Whole models take any number of batches.
    for make, count in ((network, 2), (divided, 3)):
        sculptor = Sculptor(make(), SculptConfig())
        for given in cases[:count]:
            with pytest.raises((ValueError, RuntimeError)) as error:
                sculptor.protect(given)
            said.append(str(error.value))
        assert not sculptor.memory
        sculptor.protect([loss])
        assert sculptor.memory.rows == {"": 2}
    sculptor = Sculptor(network(), SculptConfig())
    sculptor.begin_task()
    optimizer = torch.optim.AdamW(sculptor.parameters(), lr=0.01)
    sculptor.attach(optimizer)
    loss(sculptor.model).backward()
    optimizer.step()
    with pytest.raises((ValueError, RuntimeError)) as error:
        sculptor.end_task([{"input": x}] if rank else [loss])
    said.append(str(error.value))
    sculptor.end_task([loss])
    return said


def test_what_one_process_cannot_use_stops_all(tmp_path):
    zero, one = launch(2, refusals, tmp_path)
    assert len(zero) == len(one) == 6
    for here, there in zip(zero, one, strict=True):
        assert here == f"rank 1 failed: ValueError: {there}" or here == there
    assert "not finite, nan" in one[0]
    assert "batches with labels" in one[-1]
    assert any("batches has 1 batches on rank 0 and more on rank 1" in text for text in zero)
