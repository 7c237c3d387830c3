"""`sculpt verify`: the leak between two checkpoints, from disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from sculpt.cli.common import (
    FINE,
    NEGATIVE,
    TROUBLE,
    orderly_exit,
    print_json,
    progress_bar,
    suffixes_or_regex,
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
    from sculpt.config import SculptConfig

    given = {"--ratio": ratio, "--effective-rank": effective_rank, "--run": run}
    named = [option for option, value in given.items() if value is not None]
    if len(named) != 1:
        raise ValueError(
            f"exactly one of {', '.join(given)} says how much is preserved; got "
            f"{' and '.join(named) or 'none'}"
        )
    fields: dict[str, Any] = {} if run is None else run_fields(run)
    if ratio is not None:
        fields["unfreeze_rank_ratio"] = ratio
    if effective_rank is not None:
        fields["effective_rank"] = _rank("--effective-rank", effective_rank)
    for entry in rank_pattern or []:
        pattern, equals, rank = entry.rpartition("=")
        if not equals or not pattern:
            raise ValueError(f"--rank-pattern {entry}: expected REGEX=RANK, e.g. 'q_proj=0.9'")
        fields.setdefault("rank_pattern", {})[pattern] = _rank("--rank-pattern", rank)
    for name, text in (("target_modules", target_modules), ("exclude_modules", exclude_modules)):
        if text is not None:
            fields[name] = suffixes_or_regex(text)
    config = SculptConfig(**{**fields, "constraint": constraint, "others": others})
    with progress_bar("reading") as progress:
        found = verify_checkpoints(before, after, config, progress=progress)
    if as_json:
        print_json({"before": str(before), "after": str(after), **found.to_dict()})
    else:
        typer.echo(str(found))
    raise typer.Exit(NEGATIVE if found.broken else FINE if found.ok else TROUBLE)


def run_fields(run: Path) -> dict[str, Any]:
    """What the `config.json` of a run directory says about sculpting.

    Raises:
        ValueError: it is not there, or says nothing.
    """
    path = run / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--run {run}: {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"--run {run}: {path} is not JSON: {error}") from error
    # The demo keeps one setting in a flat file, a run all of them in a section.
    section = config.get("config", config) if isinstance(config, dict) else None
    if isinstance(section, dict) and isinstance(section.get("sculpt"), dict):
        if section["sculpt"].get("ranks") is not None:
            raise ValueError(
                f"--run {run}: its ranks adapt to each matrix and task; results.json has them "
                "under 'subspaces': give --ratio and --rank-pattern"
            )
        if section["sculpt"].get("subspaces", "weights") != "weights":
            raise ValueError(
                f"--run {run}: from its second task on its subspaces come from what earlier tasks "
                "use, which two checkpoints do not tell; results.json has its certificates. For "
                "its first task give --ratio"
            )
        return dict(section["sculpt"])
    if isinstance(section, dict) and isinstance(section.get("ratio"), float):
        return {"unfreeze_rank_ratio": section["ratio"]}
    raise ValueError(f"--run {run}: {path} has neither 'sculpt' settings nor a 'ratio'")


def _rank(option: str, text: str) -> int | float:
    """`"128"` counts directions, `"0.75"` is a fraction."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise ValueError(f"{option} {text}: expected an int (directions) or a fraction such as 0.75")
