"""The `sculpt` command."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from sculpt.cli.common import EXIT_CODES, end_by_certificates, orderly_exit
from sculpt.cli.doctor import doctor
from sculpt.cli.inspect import inspect
from sculpt.cli.report import report
from sculpt.cli.verify import verify
from sculpt.installation import require_own_package

app = typer.Typer(
    name="sculpt",
    help="Continual full fine-tuning of language models in trailing singular subspaces.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _before_all_commands(print_version: bool) -> None:
    with orderly_exit():
        require_own_package()
    if print_version:
        from sculpt import __version__

        typer.echo(f"sculpt {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_before_all_commands, is_eager=True, help="Version."),
    ] = False,
) -> None:
    """Continual full fine-tuning of language models in trailing singular subspaces."""


@app.command()
@orderly_exit()
def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="A small sentence encoder: under 2 minutes.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the examples drawn and their order.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Run directory, new or empty; by default runs/demo-TIME.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Another causal model: a Hugging Face directory.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Trainable fraction of the singular directions.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps for each task.")] = None,
    lr: Annotated[
        float | None, typer.Option(help="AdamW learning rate, in terms of dense weights.")
    ] = None,
) -> None:
    """Three real tasks in a row, by plain full fine-tuning and by sculpt, side by side."""
    from rich.console import Console

    from sculpt.demo.run import run_demo
    from sculpt.demo.settings import QUICK, DemoSettings
    from sculpt.report.results import tables

    console = Console(markup=False)
    if not console.is_terminal:
        console.width = 120
    choices: dict[str, Any] = QUICK if quick else {}
    choices = choices | {
        name: value
        for name, value in {"model": model, "ratio": ratio, "steps": steps, "lr": lr}.items()
        if value is not None
    }
    run_directory = out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    results = run_demo(DemoSettings(out=run_directory, seed=seed, **choices), console)
    console.print(tables(results))
    console.print(f"Run directory: {run_directory}", highlight=False, soft_wrap=True)
    end_by_certificates(results)


@app.command()
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
    from sculpt.cli.runs import train_command

    end_by_certificates(train_command(run_file, overrides or [], dry_run, skip_bad_rows))


@app.command()
@orderly_exit()
def resume(
    run_dir: Annotated[Path, typer.Argument(help="Run directory of `sculpt train`.")],
) -> None:
    """Go on with a run that was killed, as if it never had been."""
    from sculpt.cli.runs import resume_command

    end_by_certificates(resume_command(run_dir))


for command in (inspect, verify, report):
    app.command()(command)
app.command()(doctor)


if __name__ == "__main__":
    app()
