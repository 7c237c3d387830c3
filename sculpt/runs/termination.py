"""SIGTERM, by which schedulers ask a process to end: as an exception, at once or when it suits.

Only the main thread can hear signals, and a handler that somebody else has set stays. A second
SIGTERM has its default effect: the process ends at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

EXIT_CODE = 128 + signal.SIGTERM
"""Of a process that ended because of it, as shells have it: 143."""


class Terminated(SystemExit):
    """SIGTERM has come. Where nobody catches it, the process ends with `EXIT_CODE`."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class Request:
    """Whether SIGTERM has come in a `with deferred()` block."""

    def __init__(self) -> None:
        self.came = False

    def obey(self) -> None:
        """Raise `Terminated` if it has."""
        if self.came:
            raise Terminated

    def _note(self, *_: Any) -> None:
        self.came = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def immediate() -> Iterator[None]:
    """Raise `Terminated` wherever the program is."""
    with _handled_by(_terminate):
        yield


@contextmanager
def deferred() -> Iterator[Request]:
    """Go on after SIGTERM, to `obey()` the request at a good moment, at the latest at the end."""
    request = Request()
    with _handled_by(request._note):
        yield request
    if request.came:
        signal.raise_signal(signal.SIGTERM)


def _terminate(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise Terminated


@contextmanager
def _handled_by(handler: Callable[..., None]) -> Iterator[None]:
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    if not main or before not in (signal.SIG_DFL, _terminate):
        yield
        return
    signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
