"""A few rows of earlier tasks, the same whenever they are drawn."""

from __future__ import annotations

import random
from collections.abc import Sequence

from sculpt.models.encoding import Encoded


def drawn(rows: Sequence[Encoded], count: int, seed: str) -> list[Encoded]:
    """So many of them, or all where there are fewer, by the seed."""
    places = random.Random(seed).sample(range(len(rows)), min(count, len(rows)))
    return [rows[place] for place in places]
