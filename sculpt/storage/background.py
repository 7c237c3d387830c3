"""Write saves in a thread, while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from sculpt.distributed.processes import Processes


class Saving:
    """A save that is being written."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future
        self.heard = False

    def done(self) -> bool:
        """Whether it has ended, well or not, in this process."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> None:
        """Wait until it is complete, for `timeout` seconds at most.

        Raises:
            Exception: what went wrong, on every process; an earlier save stays whole.
            TimeoutError: it is not done yet.
        """
        self._future.exception(timeout)
        self.heard = True
        self._future.result()


class Background:
    """At most one save at a time, in a thread of its own."""

    def __init__(self) -> None:
        self._last: Saving | None = None
        self._processes: Processes | None = None

    def settle(self) -> None:
        """Wait for the save that is under way.

        Raises:
            Exception: it failed, and nobody has been told.
        """
        last, self._last = self._last, None
        if last is not None and not last.heard:
            last.result()

    def start(self, write: Callable[[Processes], None], processes: Processes) -> Saving:
        """Call `write` in the thread, with processes that no other thread talks to."""
        if self._processes is None:
            self._processes = processes.apart()
        executor = ThreadPoolExecutor(1, thread_name_prefix="sculpt-save")
        self._last = Saving(executor.submit(write, self._processes))
        executor.shutdown(wait=False)
        return self._last
