"""What a run tells the services that its configuration names."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tiny_runs import run_config
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from sculpt.report.results import Results
from sculpt.runs.start import resume, run
from sculpt.runs.state import Progress

CHECKPOINTS = {"every_steps": 2}
TRAINING = {"steps": 3, "batch_size": 2, "lr": 1e-2, "warmup_steps": 1}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a service named "recorder" hears: `(step, values)`, "begin" and "end"."""
    heard: list[Any] = []

    class Recorder(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            heard.append("begin")

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
            heard.append((state.global_step, logs))

        def on_train_end(self, *_: Any, **__: Any) -> None:
            heard.append("end")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    return heard


def numbers(heard: list[Any]) -> dict[tuple[int, str], float]:
    """The last value told for each step and name, without those that depend on the clock."""
    found = {}
    for item in heard:
        if not isinstance(item, str):
            step, values = item
            found |= {(step, name): value for name, value in values.items()}
    return {key: value for key, value in found.items() if key[1] != "tokens_per_second"}


def test_losses_scores_and_leaks(told: list[Any], tmp_path: Path) -> None:
    results = run(run_config(tmp_path, loggers=["recorder"], training=TRAINING))
    [result] = results.methods.values()
    assert (told[0], told[-1], told.count("begin"), told.count("end")) == ("begin", "end", 1, 1)
    found = numbers(told)
    losses = [loss for task in result.losses for loss in task]
    assert [found[step, "loss"] for step in range(1, 7)] == losses
    assert [found[step, "learning_rate"] for step in range(1, 7)] == [5e-3, 1e-2, 1e-2] * 2
    assert [found[step, "task"] for step in (0, 3)] == [0, 1]
    assert found[0, "sculpt/trainable_elements"] == result.trainable_elements
    for step, certificate in zip((3, 6), result.certificates, strict=True):
        assert found[step, "sculpt/worst_leak"] == certificate.worst.leak
        assert found[step, "sculpt/certificate_holds"] == 1.0
    assert found[3, "eval_generated/very"] == result.generated[0][0]
    assert (3, "eval_generated/short") not in found
    assert found[6, "eval_generated/short"] == result.generated[1][1]
    mean = math.fsum(result.among_labels[1]) / 2
    assert found[6, "eval_among_labels/average_accuracy"] == pytest.approx(mean)
    lost = max(result.generated[0][0], result.generated[1][0]) - result.generated[1][0]
    assert found[6, "eval_generated/forgetting"] == pytest.approx(lost)


def test_after_a_kill_the_same_numbers_at_the_same_steps(told: list[Any], tmp_path: Path) -> None:
    config = run_config(tmp_path, loggers=["recorder"], training=TRAINING, checkpoint=CHECKPOINTS)
    run(config)
    expected = numbers(told)
    told.clear()

    def stop(now: Progress) -> None:
        if (now.task, now.phase, now.done) == ("short", "train", 3):
            raise KeyboardInterrupt

    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        run(config.model_copy(update={"out": out}), stop)
    assert told[-1] == "end", "the services are left in order"
    assert isinstance(resume(out), Results)
    assert numbers(told) == expected


def test_a_name_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="did you mean 'tensorboard'"):
        run_config(tmp_path, loggers=["tensorbord"])


def test_a_service_that_is_not_installed_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise RuntimeError("requires it to be installed")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mlflow", missing)
    with pytest.raises(ValueError, match="logging to 'mlflow' is not possible here: requires"):
        run(run_config(tmp_path, loggers=["mlflow"]))
    assert not (tmp_path / "run").exists()


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(run_config(tmp_path, loggers=["tensorboard"]))
    board = EventAccumulator(str(tmp_path / "run" / "runs" / "sculpt"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert len(board.Scalars("eval/generated/very")) == 2
