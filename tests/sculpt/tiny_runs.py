"""Runs of a tiny model on tiny files, of the kinds that users have."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_language import SHORT, VERY, tiny_model, tiny_tokenizer

from sculpt.data.examples import Task
from sculpt.models.causal import CausalLearner
from sculpt.runs.config import RunConfig
from sculpt.runs.start import resume, run
from sculpt.runs.state import Progress


def save_tiny_model(path: Path) -> Path:
    CausalLearner(tiny_model(), tiny_tokenizer()).save(path)
    return path


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def task_files(folder: Path, task: Task) -> dict[str, Any]:
    """The task as JSON lines, and the configuration that reads it."""
    files = {
        split: str(
            write_lines(
                folder / f"{task.name}-{split}.jsonl",
                ({"text": e.text, "label": e.answer} for e in examples),
            )
        )
        for split, examples in (("train", task.train), ("test", task.test))
    }
    suffix = task.train[0].suffix
    return {"name": task.name, **files, "labels": list(task.labels), "suffix": suffix}


def run_values(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run of two tasks in `folder`; `changes` replace sections as a whole."""
    model = folder / "tiny"
    if not model.is_dir():
        save_tiny_model(model)
    values = {
        "model": str(model),
        "out": str(folder / "run"),
        "data": {"tasks": [task_files(folder, task) for task in (VERY, SHORT)]},
        "training": {"steps": 3, "batch_size": 2, "lr": 1e-2},
    }
    return values | changes


def run_config(folder: Path, **changes: Any) -> RunConfig:
    return RunConfig.model_validate(run_values(folder, **changes))


class Stopped(BaseException):
    """Stands for the end of the process: nothing may catch it and tidy up."""


def run_until(config: RunConfig, when: int | Callable[[Progress], bool]) -> None:
    """Run up to the event of this number, or the first one of which `when` is true."""
    events = count(1)

    def report(now: Progress) -> None:
        event = next(events)
        if event == when if isinstance(when, int) else when(now):
            raise Stopped

    with pytest.raises(Stopped):
        run(config, report)


def whole_and_resumed(model: Path, method: str, stop: int) -> list[dict[str, torch.Tensor]]:
    """Weights after a run with dropout, and after one that is stopped at training step `stop`."""
    steps, weights = 0, []

    def count(now: Progress) -> None:
        nonlocal steps
        steps += now.phase == "train"
        if steps == stop:
            raise KeyboardInterrupt

    for out in ("whole", "resumed"):
        config = run_config(
            model.parent,
            model=str(model),
            out=str(model.parent / out),
            method=method,
            training={"steps": 4, "batch_size": 2, "lr": 1e-2, "dropout": True},
            checkpoint={"every_steps": 1},
        )
        if out == "whole":
            certificates = run(config).methods[method].certificates
            assert all(certificate.ok for certificate in certificates)
        else:
            with pytest.raises(KeyboardInterrupt):
                run(config, count)
            resume(config.out)
        weights.append(load_file(config.out / "model" / "model.safetensors"))
    return weights
