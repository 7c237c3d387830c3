"""`sculpt demo`: three real tasks in a row, by plain fine-tuning and by sculpt."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from sculpt.cli.common import end_by_certificates, orderly_exit


@orderly_exit()
def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="A small sentence encoder: a few minutes.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the examples drawn and their order.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Run directory, new or empty; by default runs/demo-TIME.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Another causal model: a Hugging Face directory.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Some of plain-low,plain,sculpt-weights,sculpt; or all.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Trainable fraction of the directions.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps for each task.")] = None,
    lr: Annotated[
        float | None, typer.Option(help="AdamW learning rate, in terms of dense weights.")
    ] = None,
) -> None:
    """Three real tasks in a row, by plain full fine-tuning and by sculpt, side by side."""
    from sculpt.cli.console import Lines, new_console, show
    from sculpt.demo.run import run_demo
    from sculpt.demo.settings import QUICK, DemoSettings
    from sculpt.demo.tasks import NAMES

    choices: dict[str, Any] = QUICK if quick else {}
    given = {"model": model, "ratio": ratio, "steps": steps, "lr": lr}
    choices = choices | {name: value for name, value in given.items() if value is not None}
    if methods is not None:
        choices["methods"] = tuple(methods.split(","))
    folder = out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    settings, console = DemoSettings(out=folder, seed=seed, **choices), new_console()
    steps = len(settings.runs(Path())) * len(NAMES) * settings.steps
    results = run_demo(settings, console, Lines(console, steps=steps))
    show(console, results, folder)
    end_by_certificates(results)
