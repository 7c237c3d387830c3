"""PEFT's rules for names of weights: which of them a pattern matches."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from sculpt.messages import did_you_mean

ALL_LINEAR = "all-linear"
Patterns = str | Sequence[str]
"""A regular expression for the whole name, or a list of names and suffixes."""


def split_targets(targets: Patterns) -> tuple[bool, Patterns]:
    """Whether `"all-linear"` is asked for, and what is named beside it."""
    if isinstance(targets, str):
        return (True, ()) if targets == ALL_LINEAR else (False, targets)
    return ALL_LINEAR in targets, [target for target in targets if target != ALL_LINEAR]


def names_of(path: str, parameter: str) -> tuple[str, ...]:
    """What a matrix may be called: as its module, and as itself where it is not the `weight`."""
    return (path,) if parameter == "weight" else (path, f"{path}.{parameter}".lstrip("."))


def matches(name: str, patterns: Patterns) -> bool:
    """Whether a pattern matches the name; a suffix begins after a dot."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in patterns)


def match_any(names: Iterable[str], patterns: Patterns) -> bool:
    return any(matches(name, patterns) for name in names)


def matches_end(name: str, pattern: str) -> bool:
    """The rule of `rank_pattern`: a regular expression for the end of the name, after a dot."""
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


def without_match(patterns: Patterns, names: Iterable[str]) -> list[str]:
    """The entries of a list, or the regular expression, that match none of the names."""
    names = list(names)
    if isinstance(patterns, str):
        return [] if match_any(names, patterns) else [patterns]
    return [entry for entry in patterns if not match_any(names, [entry])]


def no_match(field: str, given: object, entry: str, names: Iterable[str]) -> str:
    """What to say of an entry of a field that matches none of the names."""
    known = {part for name in names for part in (name, name.rpartition(".")[2])}
    return f"{field}={given!r}: {entry!r} matches nothing{did_you_mean(entry, known)}"
