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

from bench.decomposition import beside
from sculpt import SculptConfig, Sculptor
from sculpt.distributed.processes import rounds

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


def held_beside():
    few, many = beside(96, 4), beside(96, 16)
    assert many["stays"] == 4 * few["stays"]
    return [(found["peak"] - found["stays"]) / found["matrix"] for found in (few, many)]


@pytest.mark.parametrize("size", [1, 3])
def test_memory_beside_the_share_does_not_grow_with_the_number_of_matrices(size, tmp_path):
    for few, many in launch(size, held_beside, tmp_path):
        # Nothing is freed later than a round after its own: one result, one whole matrix.
        assert many <= few + 2
        assert few < 20
