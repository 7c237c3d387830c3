"""What the commands share: how they end, and options that become a configuration."""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sculpt.runs import termination

if TYPE_CHECKING:
    from sculpt.config import SculptConfig
    from sculpt.report.results import Results

FINE, NEGATIVE, TROUBLE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, termination.EXIT_CODE
EXIT_CODES = """\
Exit codes of all commands:
  0  fine
  1  a negative verdict: a constraint is broken, a self-test fails
  2  not done, or not told: bad input, an error, a run that fails
130  after Ctrl-C
143  after SIGTERM"""


@contextmanager
def orderly_exit() -> Iterator[None]:
    """End as `EXIT_CODES` says. What a user can mend is printed as `error: ...`."""
    try:
        with termination.immediate():
            yield
    except typer.Exit:
        raise
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(TROUBLE) from None
    except Exception:  # ours to mend; Python would end with the code of a negative verdict
        traceback.print_exc()
        raise typer.Exit(TROUBLE) from None
    except (KeyboardInterrupt, termination.Terminated) as stop:
        typer.secho("; ".join(["stopped", *getattr(stop, "__notes__", ())]), err=True)
        stopped = isinstance(stop, KeyboardInterrupt)
        raise typer.Exit(INTERRUPTED if stopped else TERMINATED) from None


def end_by_certificates(results: Results | None) -> None:
    """End with `NEGATIVE` where a constraint is broken, and print which."""
    methods = results.methods.values() if results is not None else ()
    certificates = [certificate for method in methods for certificate in method.certificates]
    broken = [certificate for certificate in certificates if not certificate.ok]
    for certificate in broken:
        typer.secho(str(certificate).partition("\n")[0], fg="red", err=True)
    if broken:
        raise typer.Exit(NEGATIVE)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on stderr, where that is a terminal, which is told `(done, total, name)`."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total, name: bar.update(
            task, completed=done, total=total, description=name
        )


def print_json(value: Any) -> None:
    """One JSON document on stdout, NaN and infinity as null."""
    from sculpt.storage.files import without_nan

    sys.stdout.write(json.dumps(without_nan(value), indent=2, allow_nan=False) + "\n")


def sculpt_config(
    *,
    ratio: float | None = None,
    effective_rank: str | None = None,
    run: Path | None = None,
    rank_pattern: list[str] | None = None,
    target_modules: str | None = None,
    exclude_modules: str | None = None,
    **fields: Any,
) -> SculptConfig:
    """The configuration that command line options describe.

    Raises:
        ValueError: none or several of the three sources of ranks, or an option that cannot be read.
    """
    from sculpt.config import SculptConfig

    given = {"--ratio": ratio, "--effective-rank": effective_rank, "--run": run}
    named = [option for option, value in given.items() if value is not None]
    if len(named) != 1:
        raise ValueError(
            f"exactly one of {', '.join(given)} says how much is preserved; got "
            f"{' and '.join(named) or 'none'}"
        )
    if run is not None:
        found = run_fields(run)
    elif ratio is not None:
        found = {"unfreeze_rank_ratio": ratio}
    else:
        assert effective_rank is not None
        found = {"effective_rank": _rank("--effective-rank", effective_rank)}
    for entry in rank_pattern or []:
        pattern, equals, rank = entry.rpartition("=")
        if not equals or not pattern:
            raise ValueError(f"--rank-pattern {entry}: expected REGEX=RANK, e.g. 'q_proj=0.9'")
        patterns = found.setdefault("rank_pattern", {})
        patterns[pattern] = _rank("--rank-pattern", rank)
    for name, text in (("target_modules", target_modules), ("exclude_modules", exclude_modules)):
        if text is not None:
            found[name] = suffixes_or_regex(text)
    return SculptConfig(**{**found, **fields})


def suffixes_or_regex(text: str) -> str | list[str]:
    """An option that takes suffixes with commas, or a regular expression.

    A single name without any sign of a regular expression is a suffix.
    """
    single = re.fullmatch(r"[\w.]+", text) is not None
    return text.split(",") if "," in text or single else text


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
