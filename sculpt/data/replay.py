"""Replay: a share of every batch is drawn from a few rows that are kept of each earlier task."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from sculpt.data.batching import batches

T = TypeVar("T")

Order = Callable[[Sequence[Any], int, int, int], Iterator[list[Any]]]
"""Endless batches of rows, of a size, by a seed, without the first few."""


class Replay(Generic[T]):
    """Keeps some rows of each task, and mixes them into the batches of later ones.

        replay = Replay(rows=64, share=0.5)
        for rows in tasks:                              # sequences of rows of any kind
            for batch in islice(replay.batches(rows, 8), steps):
                ...                                     # 8 rows, half of them of earlier tasks
            replay.keep(rows)

    Batches depend on the seed, on what is kept and on the number of rows alone: a loop that is
    taken up again needs the same `kept`, and `skip`.

    Args:
        rows: how many are kept of each task.
        share: of each batch that is drawn from them, in (0, 1), rounded to whole rows.
        seed: of all that is drawn.

    Attributes:
        kept: rows of each earlier task.

    Raises:
        TypeError, ValueError: a value does not fit.
    """

    def __init__(self, rows: int, share: float, *, seed: int = 0) -> None:
        if isinstance(rows, bool) or not isinstance(rows, int):
            raise TypeError(f"rows must be an int; got {rows!r}")
        if rows < 1:
            raise ValueError(f"rows={rows}, expected at least 1")
        if isinstance(share, bool) or not isinstance(share, int | float):
            raise TypeError(f"share must be a number; got {share!r}")
        if not 0 < share < 1:
            raise ValueError(f"share={share}, expected a number above 0 and below 1")
        self.rows = rows
        self.share = share
        self.seed = seed
        self.kept: list[list[T]] = []

    def keep(self, rows: Sequence[T]) -> None:
        """Keep some rows of the task that has ended, or all where there are fewer.

        Raises:
            ValueError: there are none.
        """
        if len(rows) == 0:
            raise ValueError("rows is empty, expected those of a task")
        self.kept.append(drawn(rows, self.rows, f"replay/{self.seed}/{len(self.kept)}"))

    def of_batch(self, size: int) -> int:
        """How many rows of a batch are those of earlier tasks.

        Raises:
            ValueError: none or all of them.
        """
        old = round(self.share * size)
        if not 0 < old < size:
            raise ValueError(
                f"share={self.share:g} of batches of {size} rows is {old} rows, expected 1 to "
                f"{size - 1}"
            )
        return old

    def batches(
        self, rows: Sequence[T], size: int, *, skip: int = 0, order: Order | None = None
    ) -> Iterator[list[T]]:
        """Endless batches of the task that follows those of which rows are kept.

        In the first task all rows of a batch are its own, later those of earlier tasks come last.

        Args:
            rows: of the task; every row comes once before any comes again.
            size: of a batch. skip: how many batches are left out.
            order: see `Order`; shuffled.

        Raises:
            ValueError: there are no rows, or a batch has none of one kind.
        """
        if len(rows) == 0:
            raise ValueError("rows is empty, expected those of a task")
        old, seed = self.of_batch(size), 1000 * self.seed + len(self.kept)
        order = shuffled if order is None else order
        if not self.kept:
            return order(rows, size, seed, skip)
        earlier = [row for task in self.kept for row in task]
        now = order(rows, size - old, seed, skip)
        before = order(earlier, old, seed + 500, skip)
        return (new + old for new, old in zip(now, before, strict=True))


def shuffled(rows: Sequence[T], size: int, seed: int, skip: int) -> Iterator[list[T]]:
    return ([rows[index] for index in batch] for batch in batches(len(rows), size, seed, skip=skip))


def drawn(rows: Sequence[T], count: int, seed: str) -> list[T]:
    """So many of them, or all where there are fewer, by the seed."""
    places = random.Random(seed).sample(range(len(rows)), min(count, len(rows)))
    return [rows[place] for place in places]
