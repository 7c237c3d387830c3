"""Tables as plain text, for `str()` of results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import StringIO


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
