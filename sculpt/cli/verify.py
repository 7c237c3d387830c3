"""`sculpt verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sculpt.cli.common import (
    FINE,
    NEGATIVE,
    TROUBLE,
    orderly_exit,
    print_json,
    progress_bar,
    sculpt_config,
)


@orderly_exit()
def verify(
    before: Annotated[Path, typer.Argument(help="Model directory before training.")],
    after: Annotated[Path, typer.Argument(help="The same model after training.")],
    ratio: Annotated[
        float | None, typer.Option(help="Trainable fraction of the singular directions.")
    ] = None,
    effective_rank: Annotated[
        str | None,
        typer.Option(help="Or the preserved rank: a number of directions, or a fraction."),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Or a run directory whose config.json has them.")
    ] = None,
    rank_pattern: Annotated[
        list[str] | None,
        typer.Option(help="REGEX=RANK: preserved rank of the matrices that match; repeatable."),
    ] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(help="What may change: suffixes with commas, or a regular expression."),
    ] = None,
    exclude_modules: Annotated[
        str | None, typer.Option(help="What of these may not change, written alike.")
    ] = None,
    constraint: Annotated[str, typer.Option(help="strict or core.")] = "strict",
    others: Annotated[
        str, typer.Option(help="'train' if tensors outside of --target-modules were trained too.")
    ] = "freeze",
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Leak certificate of two checkpoints, from disk, one matrix at a time.

    A negative verdict: the constraint is broken. Where the rounding of the weights hides it, it is
    not told.
    """
    from sculpt.certificate.disk import verify_checkpoints

    config = sculpt_config(
        ratio=ratio,
        effective_rank=effective_rank,
        run=run,
        rank_pattern=rank_pattern,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        constraint=constraint,
        others=others,
    )
    with progress_bar("reading") as progress:
        found = verify_checkpoints(before, after, config, progress=progress)
    if as_json:
        print_json({"before": str(before), "after": str(after), **found.to_dict()})
    else:
        typer.echo(str(found))
    raise typer.Exit(NEGATIVE if found.broken else FINE if found.ok else TROUBLE)
