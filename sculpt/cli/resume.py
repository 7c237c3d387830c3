"""`sculpt resume`: go on with a run that was killed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sculpt.cli.common import end_by_certificates, orderly_exit


@orderly_exit()
def resume(
    run_dir: Annotated[Path, typer.Argument(help="Run directory of `sculpt train`.")],
) -> None:
    """Go on with a run that was killed, as if it never had been."""
    from sculpt.cli.console import Lines, new_console, notes, show
    from sculpt.runs import start

    console = new_console()
    with notes():
        results = start.resume(run_dir, Lines(console))
    if results is None:
        console.print(f"{run_dir} is finished; nothing is left to do")
        return
    show(console, results, run_dir)
    end_by_certificates(results)
