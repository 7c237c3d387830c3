"""`sculpt report`: finished runs as one self-contained HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sculpt.cli.common import orderly_exit, progress_bar


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
    from sculpt.report import page
    from sculpt.storage.files import replacing_file

    with progress_bar("spectra") as progress:
        text = page.report(run_dirs, with_spectra=spectra, progress=progress)
    file = out or run_dirs[0] / "report.html"
    with replacing_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
    typer.echo(str(file))
