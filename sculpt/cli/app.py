"""The `sculpt` command: its commands, its help and `--version`."""

from __future__ import annotations

from typing import Annotated

import typer

from sculpt.cli.common import EXIT_CODES, orderly_exit
from sculpt.cli.demo import demo
from sculpt.cli.doctor import doctor
from sculpt.cli.inspect import inspect
from sculpt.cli.report import report
from sculpt.cli.train import resume, train
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


for command in (demo, train, resume, inspect, verify, report, doctor):
    app.command()(command)


if __name__ == "__main__":
    app()
