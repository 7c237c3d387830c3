"""One method in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.connection import Connection

from sculpt.runs.config import RunConfig
from sculpt.runs.start import run


@dataclass(frozen=True)
class Failure:
    """Why a method stopped."""

    message: str


def work(config: RunConfig, connection: Connection) -> None:
    """Run `config`, sending `Progress` and at last `MethodResult` or `Failure`."""
    _quiet_transformers()
    try:
        results = run(config, connection.send)
        connection.send(results.methods[config.method])
    except (BrokenPipeError, ConnectionResetError):
        return  # The parent is gone: nobody is left to tell.
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        connection.send(Failure(str(error)))


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
