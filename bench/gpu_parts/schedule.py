"""The parts of the script in order, each in a process of its own with a time limit.

A part that hangs, or after which the device answers with errors only, loses what it was about to
measure and nothing else. The processes are forked from one that has imported everything and has not
touched the device, so that each starts in a moment.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu_parts.run import Broken, Run
from sculpt.storage.files import write_json

# Seconds that a part may take beyond its deadline before it is killed: the case that it is in.
GRACE = 6.0
# Processes that a part may use up: after each but the last it goes on behind the case that broke.
ATTEMPTS = 3
BROKEN = 3


@dataclass(frozen=True)
class Part:
    """What a part does, the seconds that it is predicted to take on an H100, and its limit."""

    run: Callable[[Run], None]
    seconds: float
    limit: float


def start_method() -> Any:
    """Processes that start with everything imported, but clean of any device."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.gpu_parts.parts"])
    return context


def do(name: str, options: argparse.Namespace, path: Path) -> None:
    """Run a part in processes until it is through, its limit is over, or too many have died."""
    from bench.gpu_parts.parts import PARTS

    part, start = PARTS[name], time.monotonic()
    # A rehearsal is for what is done, not for how long it takes on a machine with other work.
    limit = part.limit if not options.tiny else float("inf")
    deadline = min(options.deadline, start + limit)
    state = "not begun"
    for _ in range(ATTEMPTS):
        if time.monotonic() >= deadline and not options.tiny:
            break
        state = _in_a_process(name, options, path, deadline)
        if not state.startswith("died"):
            break
        _give_up(path, state)
    results = json.loads(path.read_text(encoding="utf-8"))
    if state.startswith(("stopped", "died")):
        results["skipped"].append(f"{name}: {state}, in {results['now'] or 'no case'}")
    results["now"] = None
    results["parts"][name] = {
        "state": state,
        "seconds": round(time.monotonic() - start, 1),
        "predicted": part.seconds,
    }
    results["seconds"] = round(time.monotonic() - options.begun, 1)
    write_json(path, results)
    print(f"part {name}: {state}, {results['parts'][name]['seconds']} s "
          f"(predicted {part.seconds:.0f} s)", flush=True)  # fmt: skip


def _in_a_process(name: str, options: argparse.Namespace, path: Path, deadline: float) -> str:
    """How the process ended."""
    process = start_method().Process(target=work, args=(name, options, path, deadline))
    process.start()
    try:
        process.join(max(0.0, deadline - time.monotonic()) + GRACE)
        stopped = process.is_alive()
    finally:
        if process.is_alive():
            for kill in (lambda: os.killpg(process.pid, signal.SIGKILL), process.kill):
                with suppress(OSError):
                    kill()
            process.join(10)
    if stopped:
        return "stopped at its limit"
    codes = {0: "done", 1: "failed", BROKEN: "died: the device answers with errors"}
    return codes.get(process.exitcode, f"died with exit code {process.exitcode}")


def _give_up(path: Path, state: str) -> None:
    """Let the next process leave out the case that this one died in."""
    results = json.loads(path.read_text(encoding="utf-8"))
    if results["now"] is not None:
        results["finished"].append(results["now"])
        results["skipped"].append(f"{results['now']}: {state}")
        results["now"] = None
    write_json(path, results)


def work(name: str, options: argparse.Namespace, path: Path, deadline: float) -> None:
    """The life of such a process."""
    os.setpgid(0, 0)
    # Where a call hangs, its place is in the log when the process is killed.
    faulthandler.dump_traceback_later(max(1.0, deadline - time.monotonic() + GRACE - 2))
    raise SystemExit(perform(name, options, path, deadline))


def perform(name: str, options: argparse.Namespace, path: Path, deadline: float) -> int:
    """Run a part here; the exit code of its process."""
    from bench.gpu_parts.parts import PARTS

    code = 0
    try:
        run = Run(options, path, deadline)
        PARTS[name].run(run)
        run.save()
    except Broken as error:
        print(f"part {name}: {error}", flush=True)
        code = BROKEN
    except Exception as error:
        traceback.print_exc()
        results = json.loads(path.read_text(encoding="utf-8"))
        results["skipped"].append(f"{name}: {type(error).__name__}: {error}"[:300])
        write_json(path, results)
        code = 1
    return code
