"""The name that was meant: what errors suggest for one that there is not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The most similar of the known names, whatever the case and the hyphens; None if none is."""
    spelled = {_letters(other): other for other in known}
    close = difflib.get_close_matches(_letters(name), spelled, n=1)
    return spelled[close[0]] if close else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'this'?"`, or nothing."""
    close = nearest(name, known)
    return "" if close is None else f"; did you mean {close!r}?"


def _letters(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
