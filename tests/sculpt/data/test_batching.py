"""The order of rows: every row once, the same for everybody who asks, and lengths side by side."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sculpt.data.batching import batches, bucketed_batches


@pytest.mark.parametrize("bucketed", [False, True])
@given(size=st.integers(1, 40), batch_size=st.integers(1, 9), skip=st.integers(0, 30))
def test_every_row_is_used_before_any_twice_and_skipping_changes_nothing(
    bucketed: bool, size: int, batch_size: int, skip: int
) -> None:
    def stream(skip: int = 0):  # type: ignore[no-untyped-def]
        if bucketed:
            return bucketed_batches([index % 5 for index in range(size)], batch_size, 3, skip=skip)
        return batches(size, batch_size, 3, skip=skip)

    drawn = list(islice(stream(), 2 * size + skip + 5))
    assert all(len(batch) == batch_size for batch in drawn)
    used = [index for batch in drawn[: 2 * size] for index in batch]
    counts = [used.count(index) for index in range(size)]
    # Rows that are sorted together may hold the end of one pass and the start of the next.
    assert max(counts) - min(counts) <= 1 + bucketed
    assert bucketed or all(
        sorted(used[size * i : size * (i + 1)]) == [*range(size)] for i in (0, 1)
    )
    assert list(islice(stream(skip), 5)) == drawn[skip : skip + 5]


def test_buckets_hold_rows_of_similar_length() -> None:
    lengths = [(7 * index) % 101 for index in range(101)]
    plain = list(islice(batches(101, 4, 1), 25))
    bucketed = list(islice(bucketed_batches(lengths, 4, 1), 25))

    def padding(drawn: list[list[int]]) -> int:
        return sum(4 * max(lengths[i] for i in b) - sum(lengths[i] for i in b) for b in drawn)

    assert padding(bucketed) < padding(plain) / 5
    first = [max(lengths[i] for i in batch) for batch in bucketed[:16]]
    assert first != sorted(first), "batches must not come in order of length"
    assert bucketed != list(islice(bucketed_batches(lengths, 4, 2), 25)), "the seed decides"
