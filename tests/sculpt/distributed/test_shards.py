"""`fully_shard`: every process has a part of every matrix."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from launch import launch
from tasks import network, train
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from sculpt import SculptConfig

HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def by_columns(parameter):
    """Where fully_shard can: it takes uneven shards along rows only."""
    last = parameter.ndim - 1
    return Shard(last if parameter.shape[last] % dist.get_world_size() == 0 else 0)


COLUMNS = {"shard_placement_fn": by_columns}
CASES = {
    "compact": (SculptConfig(), {}, {}),
    "all coordinates, others": (
        SculptConfig(coordinates="full", others="train"),
        {},
        {"accumulate": 2},
    ),
    "core, update": (SculptConfig(constraint="core"), {}, {}),
    "strict, update": (SculptConfig(engine="update"), {}, {}),
    "columns": (SculptConfig(), COLUMNS, {}),
    "columns, all coordinates": (SculptConfig(coordinates="full"), COLUMNS, {}),
    "columns, update": (SculptConfig(engine="update"), COLUMNS, {}),
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
        (3, FEW),
        (4, FEW),
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
