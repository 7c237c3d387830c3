"""The comparison of engines keeps every run, goes on where it stopped, and prints its table."""

from __future__ import annotations

import json
import subprocess

import pytest

from bench import engines

pytest.importorskip("peft")


@pytest.fixture
def runs(monkeypatch) -> list[list[str]]:
    """Commands of the runs, each of which answers at once; the fourth fails."""
    commands: list[list[str]] = []

    def answer(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if len(commands) == 4:
            raise subprocess.CalledProcessError(1, command)
        seed = int(command[command.index("--seed") + 1])
        row = {"seed": seed, "learned": [0.5, 0.7], "average_accuracy": 0.6, "forgetting": 0.1}
        return subprocess.CompletedProcess(command, 0, stdout=f"progress\n{json.dumps(row)}\n")

    monkeypatch.setattr(subprocess, "run", answer)
    return commands


def test_it_goes_on_where_it_stopped(tmp_path, runs, capsys):
    arguments = ["--seed", "0", "1", "--tests", "6", "--out", str(tmp_path)]
    with pytest.raises(subprocess.CalledProcessError):
        engines.main(arguments)
    assert len(json.loads((tmp_path / engines.NAME).read_text())["rows"]) == 3
    engines.main(arguments)
    assert len(runs) == 4 + 5
    assert "| compact, full | 2 | 0.600 ± 0.000 |" in capsys.readouterr().out
    engines.main(arguments)
    assert len(runs) == 4 + 5
    kept = json.loads((tmp_path / engines.NAME).read_text())
    assert [row["way"] for row in kept["rows"]] == [way for way in engines.WAYS for _ in (0, 1)]
    with pytest.raises(SystemExit, match="holds runs with 6 test texts, not 7"):
        engines.main(["--tests", "7", "--out", str(tmp_path)])
