"""What the commands share: how they end, what they print of their progress, patterns as options."""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from sculpt.runs import termination

if TYPE_CHECKING:
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


def end_by_certificates(results: Results) -> None:
    """End with `NEGATIVE` where a constraint is broken, and print which."""
    certificates = [one for method in results.methods.values() for one in method.certificates]
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


def suffixes_or_regex(text: str) -> str | list[str]:
    """An option that takes suffixes with commas, or a regular expression.

    A single name without any sign of a regular expression is a suffix.
    """
    single = re.fullmatch(r"[\w.]+", text) is not None
    return text.split(",") if "," in text or single else text
