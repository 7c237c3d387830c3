"""`sculpt doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from sculpt.cli.common import FINE, NEGATIVE, orderly_exit, print_json


@orderly_exit()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """What runs here: packages, GPU, backends, and a self-test of each against the reference.

    A negative verdict: something that is available does not compute what it should, or another
    distribution replaces files of this one.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from sculpt.cli.diagnosis import diagnose

    found = diagnose()
    if as_json:
        print_json(found.to_dict())
        raise typer.Exit(FINE if found.ok else NEGATIVE)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 120
    for title, values in (
        ("Machine", found.machine),
        ("Packages", found.packages),
        ("Backends", found.backends),
    ):
        table = Table(
            title=title, title_justify="left", box=None, show_header=False, pad_edge=False
        )
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for name, value in values.items():
            table.add_row(name, value)
        console.print(table, "")
    table = Table(
        title="Self-test, float32 against float64", title_justify="left", box=box.SIMPLE_HEAD
    )
    for column in ("operation", "backend", "device", "error", "plain torch", "ms", "result"):
        table.add_column(
            column, justify="right" if column in ("error", "plain torch", "ms") else "left"
        )
    for check in found.checks:
        numbers = ("", "", "")
        if check.error is not None:
            numbers = (f"{check.error:.1e}", f"{check.plain:.1e}", f"{check.milliseconds:.1f}")
        result = check.failure or (f"not there: {check.skipped}" if check.skipped else "")
        result = result or ("ok" if check.ok else "WRONG")
        style = "" if check.ok else "red"
        table.add_row(check.operation, check.backend, check.device, *numbers, result, style=style)
    console.print(table)
    wrong = [check for check in found.checks if not check.ok]
    if wrong:
        console.print(f"{len(wrong)} of {len(found.checks)} self-tests failed.", style="red")
    if found.conflict is not None:
        console.print(found.conflict, style="red")
    if not found.ok:
        raise typer.Exit(NEGATIVE)
    console.print("Everything that is available here computes what it should.", style="bold")
