"""Packed rows are the rows that went in, in a fraction of the memory."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sculpt.models.encoding import IGNORED, Encoded, PackedRows

TOKENS = st.lists(st.integers(IGNORED, 2**31 - 1), max_size=5).map(tuple)
ROWS = st.lists(st.builds(Encoded, TOKENS, TOKENS, st.integers(0, 99)), max_size=5)


@given(ROWS, st.slices(5))
def test_what_comes_out_is_what_went_in(rows: list[Encoded], part: slice) -> None:
    packed = PackedRows(rows)
    assert len(packed) == len(rows)
    assert list(packed) == rows
    assert packed[part] == rows[part]
    assert [packed[-place] for place in range(1, len(rows) + 1)] == rows[::-1]
    assert packed.cut == sum(row.cut > 0 for row in rows)
    with pytest.raises(IndexError):
        packed[len(rows)]


def test_a_token_takes_few_bytes() -> None:
    tokens = 200_000
    tracemalloc.start()
    packed = PackedRows(
        Encoded(tuple(range(n, n + 500)), tuple(range(n, n + 500))) for n in range(0, tokens, 500)
    )
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(packed) == 400
    # Two numbers of 4 bytes, and what arrays keep free to grow by an eighth.
    assert held < 8 * tokens * 1.3
