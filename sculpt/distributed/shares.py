"""Which process does which matrix: whole matrices, balanced by cost, in rounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest


def rounds(shapes: Sequence[tuple[int, ...]], size: int) -> list[list[int | None]]:
    """For each round the index of the matrix that each of `size` processes takes, or `None`.

    Costs are those of a dense decomposition, `count m n min(m, n)`. The most expensive matrix goes
    to whoever has least so far (Graham's longest processing time: at most 4/3 of the optimum);
    everybody begins with the largest, so the matrices of a round are of similar size.
    """
    costs = [math.prod(shape) * min(shape[-2:]) for shape in shapes]
    taken: list[list[int]] = [[] for _ in range(size)]
    load = [0] * size
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = load.index(min(load))
        taken[rank].append(index)
        load[rank] += costs[index]
    return [list(matrices) for matrices in zip_longest(*taken)]
