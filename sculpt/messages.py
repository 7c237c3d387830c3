"""Texts for users: the warning class, the nearest known name, plain tables."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from io import StringIO


class SculptWarning(UserWarning):
    """Something was done, or left out, that its owner should know of; the command shows it."""


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


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, note: str = "") -> str:
    """Columns under a header: the first flush left, the others flush right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, title in enumerate(header):
        table.add_column(title, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    buffer = StringIO()
    console = Console(file=buffer, width=200, color_system=None, highlight=False, markup=False)
    console.print(table)
    text = "\n".join(line.rstrip() for line in buffer.getvalue().strip("\n").splitlines())
    return f"{text}\n{note}" if note else text
