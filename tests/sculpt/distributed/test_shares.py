"""Which process decomposes which matrix, and that it does not matter."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launch import launch
from tasks import network
from torch import nn
from torch.distributed.fsdp import fully_shard

from bench.memory import peak
from sculpt import SculptConfig, Sculptor
from sculpt.distributed.processes import Processes, rounds
from sculpt.distributed.sharding import local
from sculpt.task.choose import find_all
from sculpt.task.targets import find_targets

SHAPES = st.lists(st.tuples(st.integers(2, 99), st.integers(2, 99)), max_size=12)


@given(SHAPES, st.integers(1, 5))
def test_every_matrix_has_one_owner_and_no_process_has_much_more_than_another(shapes, size):
    plan = rounds(shapes, size)
    taken = [[index for index in column if index is not None] for column in zip(*plan, strict=True)]
    assert len(taken) == size or not shapes
    assert sorted(index for column in taken for index in column) == list(range(len(shapes)))
    costs = [math.prod(shape) * min(shape) for shape in shapes]
    loads = [sum(costs[index] for index in column) for column in taken] or [0]
    # Nobody begins another matrix while somebody else has less to do.
    assert max(loads) - min(loads) <= max(costs, default=0)
    assert all(costs[a] >= costs[b] for column in taken for a, b in itertools.pairwise(column))


def bases(config):
    sculptor = Sculptor(network(), config)
    seen = []
    table = sculptor.begin_task(progress=lambda *state: seen.append(state))
    assert [done for done, _, _ in seen] == list(range(1, len(table.rows) + 1))
    assert {name for _, _, name in seen} == {row.name for row in table.rows}
    parts = []
    for matrix in sculptor._task.matrices.values():
        parts += [matrix.bases.U, matrix.bases.V, matrix.bases.removed, matrix.bases.energy]
    return parts


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_same_bits_from_any_number_of_processes(size, tmp_path):
    config = SculptConfig(coordinates="full")
    alone = bases(config)
    for found in launch(size, bases, tmp_path, config):
        for ours, theirs in zip(alone, found, strict=True):
            same = torch.equal if isinstance(ours, torch.Tensor) else lambda a, b: a == b
            assert same(ours, theirs)


def held_beside(layers):
    """Bytes at the peak of all decompositions, bases that stay left out, over those of one matrix;
    and bytes of these bases."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(96, 96, bias=False) for _ in range(layers)))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    config = SculptConfig(unfreeze_rank_ratio=0.25)
    targets, found = find_targets(model, config).chosen, []
    processes = Processes(None, torch.device("cpu"))
    held = peak(lambda: found.extend(find_all(targets, config, {}, None, processes, None)))
    stays = sum(local(part).nbytes for bases in found for part in (bases.U, bases.V))
    return (held.total - stays) / (4 * 96**2), stays


def held_by_few_and_many():
    (few, small), (many, large) = held_beside(4), held_beside(16)
    assert large == 4 * small
    return few, many


@pytest.mark.parametrize("size", [1, 3])
def test_memory_beside_the_share_does_not_grow_with_the_number_of_matrices(size, tmp_path):
    for few, many in launch(size, held_by_few_and_many, tmp_path):
        # Nothing is freed later than a round after its own: one result, one whole matrix.
        assert many <= few + 2
        assert few < 20
