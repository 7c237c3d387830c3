"""DistributedDataParallel: every process has the whole model."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from launch import launch
from tasks import batch, network, refused, share, started, steps, train
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from sculpt import AdaptiveRanks, SculptConfig, Sculptor
from sculpt.storage import task as state


class Unused(nn.Module):
    """A network with a layer that no batch reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()  # sets the seed
        self.idle = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def replicas(build, config, options, accumulate):
    return train(
        build(),
        config,
        lambda model: DistributedDataParallel(model, **options),
        accumulate=accumulate,
    )


@pytest.mark.parametrize(
    ("size", "accumulate", "config"),
    [
        (1, 1, SculptConfig()),
        (2, 2, SculptConfig(coordinates="full")),
        (2, 1, SculptConfig(constraint="core")),
        (3, 2, SculptConfig(others="train")),
        (4, 1, SculptConfig()),
    ],
    ids=lambda value: str(getattr(value, "chosen_engine", value)),
)
def test_same_training_as_in_one_process(size, accumulate, config, tmp_path):
    # The gradient of a mean over pieces does not depend on how they are cut.
    alone = train(network(), config, accumulate=1)
    together = launch(size, replicas, tmp_path, network, config, {}, accumulate)
    for result in together:
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(result["weights"][name], weight, rtol=0, atol=1e-6)
            assert torch.equal(result["weights"][name], together[0]["weights"][name])
        assert all(leak <= limit for leak, limit in result["leaks"])
        torch.testing.assert_close(
            torch.tensor(result["losses"]), torch.tensor(alone["losses"]), rtol=0, atol=1e-6
        )
        assert result["losses"] == together[0]["losses"]


def test_layers_that_no_batch_reaches(tmp_path):
    alone = train(Unused(), SculptConfig())
    options = {"find_unused_parameters": True}
    for result in launch(2, replicas, tmp_path, Unused, SculptConfig(), options, 1):
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(result["weights"][name], weight, rtol=0, atol=1e-6)


def sharded_optimizer():
    """ZeRO stage 1: every process keeps the moments of some coordinates."""
    model = network()
    kind = partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW)
    sculptor, optimizer = started(model, kind=kind)
    steps(DistributedDataParallel(model), optimizer, 0, 5)
    assert sculptor.verify().ok
    sculptor.end_task()
    return model.state_dict()


def test_optimizer_state_may_be_divided(tmp_path):
    model = network()
    _, optimizer = started(model)
    steps(model, optimizer, 0, 5)
    for weights in launch(2, sharded_optimizer, tmp_path):
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6)


def refusals():
    rank = dist.get_rank()

    def begin(model=None, **options):
        return lambda: started(model or network(), SculptConfig(**options))

    ratios = "config unfreeze_rank_ratio=0.25, rank 1 has 0.5"
    refused(ratios, begin(unfreeze_rank_ratio=0.25 + rank / 4), ValueError)
    ranks = r"config rank_pattern=\{'2': 3\}, rank 1 has \{'2': 4\}"
    refused(ranks, begin(rank_pattern={"2": 3 + rank}), ValueError)
    other = network()
    with torch.no_grad():
        other[2].weight[0, 0] += rank
    refused("weight sum of 2=", begin(other), ValueError)
    broken = network()
    broken[4].weight.data[0, 0] = torch.nan
    refused(r"4\.weight cannot be split", begin(broken))
    wrapped = DistributedDataParallel(network())
    refused(r"begin_task\(\) on the plain model first", begin(wrapped), ValueError)

    model = network()
    early = DistributedDataParallel(model)
    _, optimizer = started(model)
    x, y = (share(part) for part in batch(0, 0))
    nn.functional.mse_loss(early(x), y).backward()
    refused("not averaged over the processes", optimizer.step, RuntimeError)


def test_refusals_come_on_every_process_and_say_what_to_do(tmp_path):
    launch(2, refusals, tmp_path)


def unreadable(*_):
    raise OSError("the original cannot be read")


def saved(folder):
    model = network()
    sculptor, _ = started(model)
    sculptor.save(folder / "save")
    sculptor.end_task()
    loaded = Sculptor.load(model, folder / "save")
    with pytest.raises((OSError, RuntimeError)) as error:
        loaded.save("/dev/null/no folder")
    saving = loaded.save_async("/dev/null/no folder")
    with pytest.raises((OSError, RuntimeError), match="no folder"):
        saving.result()
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 0:
            patch.setattr(state, "fixed_tensors", unreadable)
        with pytest.raises((OSError, RuntimeError), match="cannot be read"):
            loaded.save_async(folder / "other")
    loaded.save_async(folder / "other").result()
    assert Sculptor.load(network(), folder / "other").verify().task == "first"
    return [row.name for row in loaded.verify().rows], str(error.value)


def test_one_process_writes_and_all_read(tmp_path):
    for names, error in launch(2, saved, tmp_path, tmp_path):
        assert names == ["0", "2", "4", "6"]
        assert "no folder" in error


def measured(parts):
    """Ranks and importance by Fisher, from losses on these parts of two batches."""
    ranks = AdaptiveRanks(mrr=0.2, trr=0.6)
    sculptor = Sculptor(network(), SculptConfig(ranks=ranks))
    losses = [lambda model, x=x: model(x).square().mean() for x in parts]
    rows = sculptor.begin_task(losses).rows
    return [(row.preserved, row.importance, row.by) for row in rows]


def measured_here():
    return measured([share(batch(0, step)[0]) for step in range(2)])


def test_importance_is_the_mean_over_the_data_of_all_processes(tmp_path):
    parts = [part for step in range(2) for part in batch(0, step)[0].chunk(2)]
    expected, importance, by = zip(*measured(parts), strict=True)
    assert set(by) == {"fisher"}
    for rows in launch(2, measured_here, tmp_path):
        ranks, found, ways = zip(*rows, strict=True)
        assert (ranks, ways) == (expected, by)
        assert found == pytest.approx(importance, abs=1e-5)


def losses_on_one():
    sculptor = Sculptor(network(), SculptConfig(ranks=AdaptiveRanks()))
    x = torch.ones(2, 13)
    own = [x] if dist.get_rank() else [lambda model: model(x).sum()]
    return {row.by for row in sculptor.begin_task(own).rows}


def test_a_loss_on_some_processes_alone_is_none(tmp_path):
    assert launch(2, losses_on_one, tmp_path) == [{"cosine"}] * 2
