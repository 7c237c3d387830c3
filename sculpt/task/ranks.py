"""How many singular directions of each matrix are preserved."""

from __future__ import annotations

import math

from sculpt.config import SculptConfig
from sculpt.task.patterns import matches_end


def preserved_rank(name: str, shape: tuple[int, int], config: SculptConfig) -> int:
    """Preserved rank `h` of the `m x n` matrix `name`, with `1 <= h <= k - 1`, `k = min(m, n)`.

    A trainable fraction `ρ` gives `h = floor((1 - ρ) k)`, a preserved fraction `φ` `floor(φ k)`,
    both kept inside the bounds; an explicit int outside them is an error. Ranks that adapt begin
    from that of a layer of mean importance, `floor(trr k)`.
    """
    k = min(shape)
    named = pattern_rank(name, k, config)
    if named is not None:
        return named
    if config.ranks is not None:
        return floor_inside(config.ranks.trr * k, k)
    if config.effective_rank is not None:
        return _from_preserved("effective_rank", config.effective_rank, name, k)
    assert config.unfreeze_rank_ratio is not None
    return floor_inside((1.0 - config.unfreeze_rank_ratio) * k, k)


def pattern_rank(name: str, k: int, config: SculptConfig) -> int | None:
    """What the first `rank_pattern` that matches says, if any does."""
    for pattern, rank in config.rank_pattern.items():
        if matches_end(name, pattern):
            return _from_preserved(f"rank_pattern[{pattern!r}]", rank, name, k)
    return None


def _from_preserved(field: str, rank: int | float, name: str, k: int) -> int:
    if isinstance(rank, float):
        return floor_inside(rank * k, k)
    if rank >= k:
        raise ValueError(
            f"{field}={rank} preserves all {k} directions of {name!r} and trains nothing; "
            f"expected at most {k - 1}"
        )
    return rank


def floor_inside(value: float, k: int) -> int:
    """`floor(value)` within `1 ... k - 1`."""
    # The small addition undoes the rounding of products such as (1 - 0.9) * 10.
    return min(max(math.floor(value + 1e-9), 1), k - 1)
