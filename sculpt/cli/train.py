"""`sculpt train` and `sculpt resume`: run a task sequence of a YAML file, go on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sculpt.cli.common import end_by_certificates, orderly_exit


@orderly_exit()
def train(
    run_file: Annotated[Path, typer.Argument(help="YAML: model, out, data, training, ...")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="E.g. training.lr=1e-5")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show data, ranks, memory and time; train nothing.")
    ] = False,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Count and list rows that cannot be used.")
    ] = False,
) -> None:
    """A task sequence: a Hugging Face model directory, JSON lines, CSV, CL_Benchmark, TRACE."""
    from sculpt.cli.console import Lines, new_console, notes, show
    from sculpt.runs.directory import check_out
    from sculpt.runs.prepare import Prepared
    from sculpt.runs.preview import preview
    from sculpt.runs.start import run
    from sculpt.runs.yaml_file import read_config

    console = new_console()
    with notes():
        more = ("data.skip_bad_rows=true",) if skip_bad_rows else ()
        config = read_config(run_file, (*(overrides or []), *more))
        if dry_run:
            check_out(config.out)
            console.print(preview(Prepared(config)), soft_wrap=True)
            return
        results = run(config, Lines(console))
    show(console, results, config.out)
    end_by_certificates(results)


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
