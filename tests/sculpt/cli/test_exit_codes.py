"""One rule for the exit codes of all commands."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from sculpt.cli.app import app
from sculpt.cli.common import EXIT_CODES
from sculpt.report.results import Results
from sculpt.runs.termination import Terminated
from tests.sculpt.report.test_page import method

COMMANDS = {
    "train": (["run.yaml"], "sculpt.runs.yaml_file.read_config"),
    "resume": (["run"], "sculpt.runs.start.resume"),
    "demo": (["--out", "run"], "sculpt.demo.run.run_demo"),
    "inspect": (["model"], "sculpt.inspection.inspect_model"),
    "verify": (["one", "two", "--ratio", "0.5"], "sculpt.certificate.disk.verify_checkpoints"),
    "report": (["run"], "sculpt.report.page.report"),
    "doctor": ([], "sculpt.cli.doctor.diagnose"),
}


def test_help_shows_every_command_and_the_rule() -> None:
    shown = " ".join(CliRunner().invoke(app, ["--help"]).output.split())
    assert " ".join(EXIT_CODES.split()) in shown
    assert len(app.registered_commands) == len(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("it is wrong"), 2, "error: it is wrong\n"),
        (OSError(28, "disk full"), 2, "error: [Errno 28] disk full\n"),
        (KeyError("ours"), 2, "KeyError: 'ours'\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (Terminated(), 143, "stopped\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_errors_and_signals(
    command: str, error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, called = COMMANDS[command]

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(called, fail)
    done = CliRunner().invoke(app, [command, *arguments])
    assert done.exit_code == code, done.output
    assert done.output.endswith(said)
    assert ("Traceback" in done.output) == isinstance(error, KeyError)


def test_where_it_stopped_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        error = KeyboardInterrupt()
        error.add_note("go on with: sculpt resume there")
        raise error

    monkeypatch.setattr("sculpt.runs.start.resume", stop)
    done = CliRunner().invoke(app, ["resume", "there"])
    assert done.output == "stopped; go on with: sculpt resume there\n"


RUNS = {
    "train": "sculpt.runs.start.run",
    "resume": "sculpt.runs.start.resume",
    "demo": "sculpt.demo.run.run_demo",
}


@pytest.mark.parametrize(("leak", "code"), [(1e-7, 0), (1e-3, 1)])
@pytest.mark.parametrize("command", RUNS)
def test_a_broken_certificate_is_a_negative_verdict(
    command: str, leak: float, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Results({"model": "m", "seed": 0}, {}, [{"name": "one"}, {"name": "two"}], {})
    results.methods["sculpt"] = method("sculpt", leak=leak)
    monkeypatch.setattr(RUNS[command], lambda *_, **__: results)
    config = SimpleNamespace(out=Path("run"))
    monkeypatch.setattr("sculpt.runs.yaml_file.read_config", lambda *_: config)
    done = CliRunner().invoke(app, [command, *COMMANDS[command][0]])
    assert done.exit_code == code, done.output
    assert ("The constraint is BROKEN" in done.output) is (code == 1)
