"""Runs that are killed again and again, at any instant, and resumed until they are finished.

Half of the kills strike at a random event of the run itself, of each kind as often: a matrix
decomposed, a step done, a file about to be written, flushed, renamed or removed. The others come
from outside after a random time.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# What the run reports, by phase.
EVENTS = {
    "subspaces": "subspaces: matrix done",
    "train": "step: done",
    "certify": "certificate: matrix done",
    "evaluate": "between tasks: test done",
}
# Times and memory differ from run to run.
MEASURED = ("seconds", "total_seconds", "step_seconds", "peak_memory_bytes")


def fingerprint(out: Path) -> dict[str, str]:
    """Digest of each file of a finished run that must not depend on how often it was killed."""
    found = {}
    for path in sorted((out / "model").rglob("*")) + sorted((out / "models").rglob("*")):
        if path.is_file():
            name = path.relative_to(out).as_posix()
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    for method in results["methods"].values():
        for name in MEASURED:
            method.pop(name)
    results["config"].pop("out")
    found["left over"] = str([p.name for p in out.rglob(".*") if p.name != ".lock"])
    found["results.json"] = hashlib.sha256(json.dumps(results).encode()).hexdigest()
    return found


def go_on(config: dict[str, Any], kind: str, number: int, where: Any) -> None:
    """In a process of its own: begin or resume the run, and die at event `number` of `kind`."""
    from sculpt.runs.config import RunConfig
    from sculpt.runs.start import resume, run

    seen: Counter[str] = Counter()

    def event(name: str) -> None:
        seen[name] += 1
        where.value = name.encode()[:63]
        if name == kind and seen[name] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    report_file_events(event)
    settings = RunConfig.model_validate(config)

    def report(now: Any) -> None:
        event(EVENTS[now.phase])

    if (settings.out / "config.json").is_file():
        resume(settings.out, report)
    else:
        run(settings, report)
    where.value = json.dumps(seen).encode()


def report_file_events(event: Callable[[str], None]) -> None:
    """Call `event` before a file is written by safetensors, flushed, renamed or removed."""
    import torch

    from sculpt.adaptive import importance
    from sculpt.storage import tensors

    places: tuple[tuple[Any, str, str], ...] = (
        (os, "fsync", "saving: flush"),
        (os, "replace", "saving: rename"),
        (shutil, "rmtree", "saving: removal"),
        (tensors, "save_file", "saving: tensors"),
        (torch.linalg, "eigh", "decomposition: within a matrix"),
        (torch.autograd, "backward", "step: backward"),
        (torch.optim.AdamW, "step", "step: optimizer"),
    )
    for owner, name, said in places:
        original = getattr(owner, name)

        def with_event(*a: Any, _original: Any = original, _said: str = said, **k: Any) -> Any:
            event(_said)
            return _original(*a, **k)

        setattr(owner, name, with_event)

    batches = importance.runs

    def calibrated(*a: Any) -> Iterator[Any]:
        for one in batches(*a):
            event("calibration: within a batch")
            yield one

    importance.runs = calibrated  # type: ignore[assignment]


def processes() -> Any:
    """A server that has imported everything already, so that a run begins at once."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["sculpt.runs.start", "transformers.models.llama"])
    return server


def until_finished(
    server: Any, config: dict[str, Any], rng: random.Random, counts: dict[str, int], seconds: float
) -> list[str]:
    """Begin, kill and resume until the run is finished; where it was each time it died.

    counts, seconds: events of each kind and time of a run that is left alone: the ranges from which
    the kills are drawn.
    """
    struck: list[str] = []
    while True:
        from_inside = rng.random() < 0.5
        where = server.Array("c", 1000)
        kind = rng.choice(sorted(counts)) if from_inside else ""
        number = rng.randint(1, counts[kind]) if from_inside else 0
        process = server.Process(target=go_on, args=(config, kind, number, where))
        process.start()
        if not from_inside:
            process.join(rng.uniform(0, seconds))
            process.kill()
        process.join()
        if process.exitcode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"the run failed with {process.exitcode} after {struck}")
        if where.value.startswith(b"{"):
            return struck
        struck.append(where.value.decode() or "before the first event")


def left_alone(server: Any, config: dict[str, Any]) -> tuple[dict[str, int], float]:
    """Events of each kind, and seconds, of a run that nobody kills."""
    where = server.Array("c", 1000)
    start = time.perf_counter()
    process = server.Process(target=go_on, args=(config, "", 0, where))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the run failed with {process.exitcode}")
    counts: dict[str, int] = json.loads(where.value)
    return counts, time.perf_counter() - start
