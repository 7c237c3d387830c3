"""Metrics reach the services that are named, and only those."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from sculpt.logs import Loggers


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What a service named "recorder" is told."""
    told: list[tuple[Any, ...]] = []

    class Recorder(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            told.append(("begin", args.output_dir, args.run_name))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
            told.append(("log", state.global_step, logs))

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            told.append(("end",))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    return told


def test_a_run_of_its_own(events, tmp_path):
    loggers = Loggers(["recorder"], tmp_path, run_name="one")
    loggers.log({"loss": 0.5, "lost": math.nan}, step=3)
    loggers.log({"lost": math.inf}, step=4)
    loggers.close()
    loggers.log({"loss": 0.1}, step=5)
    assert events == [
        ("begin", str(tmp_path), "one"),
        ("log", 3, {"loss": 0.5}),
        ("end",),
    ]


def test_names_that_do_not_work(tmp_path, monkeypatch):
    Loggers([], tmp_path).log({"loss": 0.5}, step=3)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="did you mean 'wandb'"):
        Loggers(["wandbb"], tmp_path)

    def missing() -> None:
        raise RuntimeError("requires it to be installed")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mlflow", missing)
    with pytest.raises(ValueError, match="logging to 'mlflow' is not possible here: requires"):
        Loggers(["mlflow"], tmp_path)


def test_tensorboard_writes_what_is_logged(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = Loggers(["tensorboard"], tmp_path)
    loggers.log({"sculpt/worst_leak": 1e-7}, step=3)
    loggers.close()
    board = EventAccumulator(str(tmp_path / "runs" / "sculpt"))
    board.Reload()
    [event] = board.Scalars("train/sculpt/worst_leak")
    assert (event.step, event.value) == (3, pytest.approx(1e-7))
