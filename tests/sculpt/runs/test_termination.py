"""SIGTERM: a run saves and stops, says how to go on, and ends with the same bits afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from kills import fingerprint
from ruamel.yaml import YAML
from tiny_runs import run_config, run_values

from sculpt.messages import SculptWarning
from sculpt.runs import termination
from sculpt.runs.config import RunConfig
from sculpt.runs.directory import RunDirectory, how_to_go_on
from sculpt.runs.start import resume, run
from sculpt.runs.state import Progress
from sculpt.runs.termination import Terminated

TRAINING = {"steps": 3, "batch_size": 2, "lr": 1e-2, "dropout": True, "order": "bucketed"}


@pytest.fixture(autouse=True)
def survive() -> Iterator[None]:
    """A signal that nobody hears must not end the tests."""
    with termination.immediate():
        yield


def terminate_at(event: int) -> Callable[[Progress], None]:
    seen = 0

    def report(now: Progress) -> None:
        nonlocal seen
        seen += 1
        if seen == event:
            signal.raise_signal(signal.SIGTERM)

    return report


def checkpoints(config: RunConfig) -> list[str]:
    return sorted(path.name for path in (config.out / "checkpoints").iterdir())


def test_a_run_stops_in_every_phase_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    events: list[Progress] = []

    def config(out: str) -> RunConfig:
        return run_config(tmp_path, out=str(tmp_path / out), training=TRAINING)

    run(config("whole"), events.append)
    expected = fingerprint(tmp_path / "whole")
    # The first event of each phase of both tasks, and the last one of all.
    edges = [
        number
        for number, now in enumerate(events, 1)
        if number == len(events) or now.phase != events[number - 2].phase
    ]
    for event in edges:
        stopped = config(f"at-{event}")
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(Terminated) as raised:
            run(stopped, terminate_at(event))
        assert raised.value.code == 143
        assert signal.getsignal(signal.SIGTERM) is before
        status = json.loads((stopped.out / "status.json").read_text())
        now = events[event - 1]
        assert status["state"] == "interrupted"
        assert (status["task"], status["phase"]) == (now.task, now.phase)
        assert status["step" if now.phase == "train" else "done"] == now.done
        assert resume(stopped.out) is not None
        assert fingerprint(stopped.out) == expected, now


@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_step_that_is_under_way_is_saved(tmp_path: Path, step: int) -> None:
    config = run_config(tmp_path, training=TRAINING)
    losses: list[float] = []

    def report(now: Progress) -> None:
        losses.append(now.loss)
        if (now.phase, now.done) == ("train", step):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Terminated) as raised:
        run(config, report)
    assert raised.value.__notes__ == [f"go on with: sculpt resume {config.out}"]
    newest = config.out / "checkpoints" / checkpoints(config)[-1] / "state.json"
    saved = json.loads(newest.read_text())["state"]
    assert (saved["phase"], saved["step"]) == ("train" if step < 3 else "certify", step)
    assert saved["result"]["losses"] == [losses[-step:]]


def test_who_is_told_how_to_go_on(tmp_path: Path) -> None:
    assert how_to_go_on(tmp_path / "none") == ""
    config = run_config(tmp_path, out=str(tmp_path / "my runs"))
    directory = RunDirectory(config.out)
    directory.describe(config, "", [])
    command = f"sculpt resume '{config.out}'"
    assert how_to_go_on(config.out) == f"begin it again with: {command}"
    (config.out / "checkpoints" / "000001").mkdir(parents=True)
    assert how_to_go_on(config.out) == f"go on with: {command}"
    directory.write_status("finished", None, "sculpt")
    assert how_to_go_on(config.out) == ""
    (config.out / "config.json").write_text('{"quick": true}')  # of a demo
    assert how_to_go_on(config.out) == ""


def test_a_request_that_comes_too_late_to_stop_is_obeyed_afterwards() -> None:
    done = []

    def finish() -> None:
        with termination.deferred() as request:
            signal.raise_signal(signal.SIGTERM)
            assert request.came
            done.append("all")

    with pytest.raises(Terminated):
        finish()
    assert done == ["all"]


def test_handlers_of_others_and_other_threads_are_left_alone(tmp_path: Path) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        config = run_config(tmp_path, training=TRAINING)
        run(config, terminate_at(15))
        assert heard == [signal.SIGTERM]
        assert RunDirectory(config.out).status() == "finished"
    finally:
        signal.signal(signal.SIGTERM, before)

    def enter() -> None:
        with termination.deferred(), termination.immediate():
            heard.append(0 if signal.getsignal(signal.SIGTERM) is before else 1)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert heard[1:] == [0]


def test_a_second_signal_ends_the_process_at_once() -> None:
    code = (
        "import importlib.util as u, signal, sys\n"
        f"spec = u.spec_from_file_location('termination', {termination.__file__!r})\n"
        "termination = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(termination)\n"
        "with getattr(termination, sys.argv[1])() as request:\n"
        "    try:\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "    except termination.Terminated:\n"
        "        pass\n"
        "    print('once', flush=True)\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    print('twice', flush=True)"
    )
    for name in ("deferred", "immediate"):
        done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (-signal.SIGTERM, "once\n"), done.stderr


def test_a_process_that_is_terminated_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    training = TRAINING | {"steps": 60}
    values = run_values(tmp_path, training=training, checkpoint={"every_steps": 1000})
    file = tmp_path / "run.yaml"
    with file.open("w", encoding="utf-8") as stream:
        YAML(typ="safe").dump(values, stream)
    process = subprocess.Popen(
        [sys.executable, "-m", "sculpt.cli.app", "train", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        },
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "very: step 6/" in line:
            process.terminate()
            break
    _, errors = process.communicate(timeout=60)
    out = tmp_path / "run"
    assert process.returncode == 143, errors
    assert errors == f"stopped; go on with: sculpt resume {out}\n"
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["task"], status["phase"]) == ("interrupted", "very", "train")
    newest = max((out / "checkpoints").iterdir()) / "state.json"
    assert json.loads(newest.read_text())["state"]["step"] == status["step"] >= 6
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".* began with .*", SculptWarning)
        assert resume(out) is not None
    run(RunConfig.model_validate(values | {"out": str(tmp_path / "whole")}))
    assert fingerprint(out) == fingerprint(tmp_path / "whole")
