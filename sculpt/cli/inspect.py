"""`sculpt inspect`: ranks, memory and FLOPs of training a model, before any of it is spent."""

from __future__ import annotations

from typing import Annotated

import typer

from sculpt.cli.common import orderly_exit, print_json, progress_bar, suffixes_or_regex


@orderly_exit()
def inspect(
    model: Annotated[str, typer.Argument(help="A Hugging Face model directory or a config.json.")],
    ratio: Annotated[
        float | None, typer.Option(help="Trainable fraction of the singular directions [0.25].")
    ] = None,
    target_modules: Annotated[
        str, typer.Option(help="Suffixes with commas, or a regular expression.")
    ] = "all-linear",
    exclude_modules: Annotated[
        str | None, typer.Option(help="What of these is left out, written alike.")
    ] = None,
    engine: Annotated[str, typer.Option(help="auto, compact, update or gradient.")] = "auto",
    constraint: Annotated[str, typer.Option(help="strict or core.")] = "strict",
    coordinates: Annotated[str, typer.Option(help="thin or full.")] = "thin",
    others: Annotated[str, typer.Option(help="freeze or train.")] = "freeze",
    weight_update: Annotated[
        str, typer.Option(help="Of 16-bit weights: stochastic or recompute.")
    ] = "stochastic",
    basis_dtype: Annotated[str, typer.Option(help="float32 or weight.")] = "float32",
    tokens: Annotated[int, typer.Option(help="Tokens of one optimizer step.")] = 4096,
    sequence: Annotated[int | None, typer.Option(help="Tokens of one sequence.")] = None,
    micro_batches: Annotated[int, typer.Option(help="Passes that a step accumulates.")] = 1,
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights; by default the model's.")
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Layers are recomputed in the backward.")
    ] = False,
    state_dtype: Annotated[
        str, typer.Option(help="Of AdamW's states: float32, int8, or trained, that of what trains.")
    ] = "float32",
    spectra: Annotated[
        bool, typer.Option("--spectra/--no-spectra", help="Read weights for singular values.")
    ] = True,
    every_matrix: Annotated[
        bool, typer.Option("--all", help="A line for every matrix, not for every kind.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Ranks, spectra, memory and FLOPs against full fine-tuning, before spending anything.

    No weight is loaded onto a device, and none at all with --no-spectra: a config.json is enough.
    """
    from sculpt.config import SculptConfig
    from sculpt.inspection import inspect_model

    config = SculptConfig(
        unfreeze_rank_ratio=ratio,
        target_modules=suffixes_or_regex(target_modules),
        exclude_modules=None if exclude_modules is None else suffixes_or_regex(exclude_modules),
        engine=engine,
        constraint=constraint,
        coordinates=coordinates,
        others=others,
        weight_update=weight_update,
        basis_dtype=basis_dtype,
    )
    with progress_bar("building the model") as progress:
        found = inspect_model(
            model,
            config,
            tokens=tokens,
            sequence=sequence,
            micro_batches=micro_batches,
            dtype=dtype,
            checkpointing=checkpointing,
            state_dtype=state_dtype,
            read_spectra=spectra,
            progress=progress,
        )
    if as_json:
        print_json(found.to_dict())
    else:
        typer.echo(found.text(every_matrix=every_matrix))
