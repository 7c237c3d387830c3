"""`sculpt report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sculpt.cli.common import orderly_exit


@orderly_exit()
def report(
    run_dirs: Annotated[list[Path], typer.Argument(help="One run directory, or several.")],
    out: Annotated[
        Path | None, typer.Option(help="Where the page goes [RUN_DIR/report.html].")
    ] = None,
    spectra: Annotated[
        bool | None,
        typer.Option(
            "--spectra/--no-spectra",
            help="Singular values of the saved model; by default where they take a minute at most.",
        ),
    ] = None,
) -> None:
    """One self-contained HTML file: matrix, curves, forgetting, spectra, leaks, cost."""
    from rich.console import Console
    from rich.progress import Progress

    from sculpt.report import page
    from sculpt.storage.files import replacing_file

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("spectra")

        def show(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name)

        text = page.report(run_dirs, with_spectra=spectra, progress=show)
    file = out or run_dirs[0] / "report.html"
    with replacing_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
    typer.echo(str(file))
