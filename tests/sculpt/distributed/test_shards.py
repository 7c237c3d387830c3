"""`fully_shard`: every process has a part of every matrix."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from launch import launch
from small_models import KINDS
from tasks import batch, network, refused, share, started, train
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from sculpt import AdaptiveRanks, SculptConfig, Sculptor

HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def by_columns(parameter):
    """Where fully_shard can: it takes uneven shards along rows only."""
    last = parameter.ndim - 1
    return Shard(last if parameter.shape[last] % dist.get_world_size() == 0 else 0)


BRIEF = {"steps": 5}
COLUMNS = {"shard_placement_fn": by_columns}
CASES = {
    "compact": (SculptConfig(), {}, {}),
    "all coordinates, others": (
        SculptConfig(coordinates="full", others="train"),
        {},
        {"accumulate": 2},
    ),
    "core, update": (SculptConfig(constraint="core"), {}, {}),
    "strict, update": (SculptConfig(engine="update"), {}, BRIEF),
    "columns": (SculptConfig(), COLUMNS, BRIEF),
    "columns, all coordinates": (SculptConfig(coordinates="full"), COLUMNS, BRIEF),
    "columns, update": (SculptConfig(engine="update"), COLUMNS, BRIEF),
    "kept gathered": (SculptConfig(originals="disk"), {"reshard_after_forward": False}, {}),
    "offload": (SculptConfig(), {"offload_policy": CPUOffloadPolicy(pin_memory=False)}, {}),
    "checkpointing": (SculptConfig(), {"checkpointing": True}, {}),
}


def divided(*, checkpointing=False, dtype=torch.float32, **options):
    """One group is a layer, one is two layers, and the rest belongs to the root."""
    model = network(dtype)
    if checkpointing:
        for index in (0, 2):
            model[index] = checkpoint_wrapper(model[index])
    fully_shard(model[0], **options)
    fully_shard([model[2], model[4]], **options)
    fully_shard(model, **options)
    return model


def whole(weights):
    return {
        name.replace("_checkpoint_wrapped_module.", ""): getattr(
            weight, "full_tensor", weight.clone
        )()
        for name, weight in weights.items()
    }


def run_cases(names):
    results = {}
    for name in names:
        config, options, how = CASES[name]
        results[name] = train(divided(**options), config, **how)
        results[name]["weights"] = whole(results[name]["weights"])
    return results


FEW = ["compact", "all coordinates, others", "core, update"]


@pytest.mark.parametrize(
    ("size", "names"),
    [
        (1, FEW),
        (2, list(CASES)),
        (3, FEW[1:2]),
        (4, FEW[:1]),
        pytest.param(3, list(CASES), marks=pytest.mark.slow),
        pytest.param(4, list(CASES), marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, int) else f"{len(value)} cases",
)
def test_same_training_as_in_one_process(size, names, tmp_path):
    results = launch(size, run_cases, tmp_path, names)
    for name in names:
        config, _, how = CASES[name]
        alone = train(network(), config, **how)
        for result in (found[name] for found in results):
            for key, weight in alone["weights"].items():
                assert torch.allclose(result["weights"][key], weight, rtol=0, atol=1e-6), name
            losses = torch.tensor(result["losses"]), torch.tensor(alone["losses"])
            assert torch.allclose(*losses, rtol=0, atol=1e-6), name
            assert all(leak <= limit for leak, limit in result["leaks"]), name


def half_and_replicas():
    """Mixed precision, and shards of which there are replicas."""
    results = {}
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("r", "s"))
    for name, options in {"half": {"mp_policy": HALF}, "replicas": {"mesh": mesh}}.items():
        for engine in ("compact", "update"):
            config = SculptConfig(engine=engine)
            results[name, engine] = train(divided(**options), config, tasks=1, steps=6)
            weights = whole(results[name, engine]["weights"])
            results[name, engine]["weights"] = weights
    # Random roundings: replicas of a shard must get the same.
    model = divided(mesh=mesh, dtype=torch.bfloat16)
    sculptor, optimizer = started(model, kind=torch.optim.SGD, lr=1.0)
    model(torch.ones(4, 13, dtype=torch.bfloat16)).square().sum().backward()
    optimizer.step()
    assert sculptor.verify().ok
    results["shards"] = [parameter.to_local() for parameter in model.parameters()]
    return results


def test_mixed_precision_and_replicas_of_shards(tmp_path):
    results = launch(4, half_and_replicas, tmp_path)
    for engine in ("compact", "update"):
        alone = train(network(), SculptConfig(engine=engine), tasks=1, steps=6)
        for result in results:
            assert all(leak <= limit for leak, limit in result["half", engine]["leaks"])
            half = torch.tensor(result["half", engine]["losses"])
            assert torch.allclose(half, torch.tensor(alone["losses"]), rtol=1e-2)
            for name, weight in alone["weights"].items():
                ours = result["replicas", engine]["weights"][name]
                torch.testing.assert_close(ours, weight, rtol=0, atol=1e-6)
    for first, second in ((0, 2), (1, 3)):
        for a, b in zip(results[first]["shards"], results[second]["shards"], strict=True):
            assert torch.equal(a, b)


ADAPTIVE = {
    "cosine": AdaptiveRanks(mrr=0.2, trr=0.6),
    "cosine, elements": AdaptiveRanks(mrr=0.2, trr=0.6, trainable_elements=150),
    "cosine, memory": AdaptiveRanks(mrr=0.2, trr=0.6, memory_bytes=8880),
    "cosine, energy": AdaptiveRanks(mrr=0.2, trr=0.6, protected_energy=0.9),
}


def adapt(make):
    """What each matrix got, and whether the certificate of a step holds."""
    found = {}
    for name, ranks in ADAPTIVE.items():
        model = make()
        sculptor = Sculptor(model, SculptConfig(ranks=ranks))
        batches = [share(batch(0, step)[0]) for step in range(2)]
        rows = sculptor.begin_task(batches).rows
        optimizer = torch.optim.AdamW(sculptor.parameters(), lr=0.01)
        sculptor.attach(optimizer)
        model(share(batch(0, 2)[0])).square().mean().backward()
        optimizer.step()
        found[name] = [(row.preserved, row.importance) for row in rows], sculptor.verify().ok
    return found


@pytest.mark.parametrize("reshard", [True, False])
def test_ranks_adapt_as_in_one_process(reshard, tmp_path):
    alone = adapt(network)
    for found in launch(2, adapt, tmp_path, partial(divided, reshard_after_forward=reshard)):
        for name, (rows, ok) in found.items():
            assert ok, name
            ranks, importance = zip(*rows, strict=True)
            expected_ranks, expected = zip(*alone[name][0], strict=True)
            assert ranks == expected_ranks, name
            assert importance == pytest.approx(expected, abs=1e-5), name
            assert len(set(ranks)) > 1, name


def adaptive_refusals():
    rank, x = dist.get_rank(), torch.ones(2, 13)
    values = r"calibration\[1\] has values that are not finite"
    for importance, batches, message in (
        ("fisher", [x], "'0' is divided by fully_shard: take importance='cosine'"),
        ("cosine", [x] * (1 + rank), "calibration has 1 batches on rank 0 and more on rank 1"),
        ("cosine", [x, x / (1 - rank)], values if rank else f"rank 1 failed: ValueError: {values}"),
        ("cosine", [], "calibration is empty"),
    ):
        sculptor = Sculptor(divided(), SculptConfig(ranks=AdaptiveRanks(importance=importance)))
        refused(message, lambda s=sculptor, b=batches: s.begin_task(b))


def test_calibration_that_divided_models_cannot_use(tmp_path):
    launch(2, adaptive_refusals, tmp_path)


LAYERS = ["conv1d, fused qkv", "mixtral experts", "gpt-oss experts", "tied head and embedding"]


def train_kind(name, wrap):
    """Three steps on the same rows in every process."""
    kind = KINDS[name]
    model = wrap(kind.build())
    sculptor, optimizer = started(model, SculptConfig(target_modules=kind.targets))
    for step in range(3):
        optimizer.zero_grad()
        kind.loss(model, step).backward()
        optimizer.step()
    certificate = sculptor.verify()
    sculptor.end_task()
    return model.state_dict(), certificate.ok


def shard_blocks(model):
    # From the inside out: what is inside has a group of its own.
    for name, module in reversed(list(model.named_modules())):
        if type(module).__name__.endswith(("DecoderLayer", "Block", "Experts")):
            assert name
            fully_shard(module)
    return fully_shard(model)


def kinds():
    found = {}
    for name in LAYERS:
        weights, ok = train_kind(name, shard_blocks)
        found[name] = whole(weights), ok
    return found


def test_kinds_of_layers(tmp_path):
    found = launch(2, kinds, tmp_path)
    for name in LAYERS:
        alone, _ = train_kind(name, lambda model: model)
        for result in found:
            weights, ok = result[name]
            assert ok, name
            for key, weight in alone.items():
                assert torch.allclose(weights[key], weight, rtol=0, atol=2e-6), (name, key)


def refusals():
    model = network()
    sculptor = Sculptor(model, SculptConfig())
    sculptor.begin_task()
    fully_shard(model)
    refused(r"call fully_shard\(model\) first, then begin_task\(\)", sculptor.parameters)

    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(13, 8))
    fully_shard(empty)
    refused(r"0\.weight is on the meta device", lambda: started(empty), ValueError)

    flat = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    refused(r"fully_shard \(FSDP2\)", lambda: started(flat), ValueError)

    late = network()
    plain = Sculptor(late, SculptConfig())
    plain.begin_task()
    first = {"device_id": torch.device("cpu"), "use_orig_params": True}
    flat = FullyShardedDataParallel(late, **first)
    refused(r"FullyShardedDataParallel \(FSDP1\)", plain.parameters, RuntimeError)
    refused("", lambda: flat(torch.ones(2, 13)))

    zero = network()
    zero[2].weight.ds_id = 0
    refused(r"2\.weight is partitioned by DeepSpeed ZeRO-3", lambda: started(zero), ValueError)

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallel = parallelize_module(network(), mesh, {"0": ColwiseParallel()})
    message = r"0\.weight is divided, and no part of the model by fully_shard: tensor"
    refused(message, lambda: started(parallel), ValueError)
    both = fully_shard(network())
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1))
    twice = distribute_tensor(torch.ones(10, 24), mesh, [Shard(0), Shard(1)])
    both[2].weight = nn.Parameter(twice)
    message = "'2', which cannot be sculpted: its weight is divided as"
    refused(message, lambda: Sculptor(both, SculptConfig(target_modules=["2"])), ValueError)
    message = "subspaces='curvature' needs something to protect"
    refused(message, lambda: started(divided(), SculptConfig(subspaces="curvature")), ValueError)

    broken = divided()
    with torch.no_grad():
        broken[4].weight.to_local()[:1] = torch.nan
    refused(r"4\.weight cannot be split", lambda: started(broken))

    lost = divided()
    forgetful = Sculptor(lost, SculptConfig())
    forgetful.begin_task()
    optimizer = torch.optim.AdamW(forgetful.parameters(), lr=0.1)
    lost(torch.ones(2, 13)).sum().backward()
    optimizer.step()
    message = r"Call sculptor\.attach\(optimizer\)"
    refused(message, lambda: lost(torch.ones(2, 13)), RuntimeError)

    skipping = divided()
    careful, optimizer = started(skipping)
    rows = torch.full((2, 13), torch.nan if dist.get_rank() == 1 else 1.0)
    skipping(rows).sum().backward()
    with pytest.warns(UserWarning, match="a step was left out"):
        optimizer.step()
    assert careful.skipped_steps == 1


def test_refusals_name_the_way_out(tmp_path):
    launch(2, refusals, tmp_path)
