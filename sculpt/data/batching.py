"""Which rows make up each step: an order that depends on a seed and the lengths, on nothing else.

The batch of step `s` is the same whoever asks, so a run that is taken up again only needs `s`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import torch

BATCHES_SORTED_TOGETHER = 16


def batches(size: int, batch_size: int, seed: int, *, skip: int = 0) -> Iterator[list[int]]:
    """Endless batches of indices below `size`, without the first `skip`.

    Every index is used once before any is used again.
    """
    rows = _shuffled(size, torch.Generator().manual_seed(seed))
    return islice(iter(lambda: list(islice(rows, batch_size)), []), skip, None)


def bucketed_batches(
    lengths: Sequence[int], batch_size: int, seed: int, *, skip: int = 0
) -> Iterator[list[int]]:
    """The same, with rows of similar length in a batch, so that little is padding.

    `BATCHES_SORTED_TOGETHER` batches of the shuffled rows are sorted by length, cut, and shuffled.
    """
    return islice(_bucketed(lengths, batch_size, torch.Generator().manual_seed(seed)), skip, None)


def _bucketed(
    lengths: Sequence[int], batch_size: int, generator: torch.Generator
) -> Iterator[list[int]]:
    together = max(1, min(BATCHES_SORTED_TOGETHER, len(lengths) // batch_size)) * batch_size
    rows = _shuffled(len(lengths), generator)
    while group := sorted(islice(rows, together), key=lambda index: (lengths[index], index)):
        cut = [group[start : start + batch_size] for start in range(0, together, batch_size)]
        for place in torch.randperm(len(cut), generator=generator).tolist():
            yield cut[place]


def _shuffled(size: int, generator: torch.Generator) -> Iterator[int]:
    """Endless passes over all rows, each in an order of its own."""
    while True:
        yield from torch.randperm(size, generator=generator).tolist()
