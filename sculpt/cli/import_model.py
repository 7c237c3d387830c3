"""`sculpt import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sculpt.cli.common import orderly_exit


@orderly_exit()
def import_model(
    source: Annotated[
        Path, typer.Argument(help="A PEFT OSF adapter, or a mini_trainer checkpoint.")
    ],
    out: Annotated[Path, typer.Argument(help="Directory of the plain model, new or empty.")],
    base: Annotated[
        Path | None, typer.Option(help="Model directory that the adapter was trained on.")
    ] = None,
) -> None:
    """Make a plain dense model of an adapter or a checkpoint of another implementation.

    Where it cannot be done, nothing is written.
    """
    from rich.console import Console
    from rich.progress import Progress

    from sculpt import importers

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading")

        def show(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name)

        found = importers.import_model(source, out, base=base, progress=show)
    typer.echo(f"{found}\n{out}")
