"""`sculpt train` and `sculpt resume` as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from tiny_runs import run_config, run_values, write_lines
from typer.testing import CliRunner, Result

from sculpt.cli.app import app
from sculpt.runs.directory import RunDirectory
from sculpt.runs.loop import Run


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    with path.open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(run_values(tmp_path), file)
    return path


def test_train_then_nothing_left_to_resume(run_file: Path) -> None:
    out = run_file.parent / "run [/1]"  # no markup
    done = invoke("train", str(run_file), f"out={out}", "training.steps=2", "seed=1")
    assert done.exit_code == 0, done.output
    assert "very: step 2/2  loss" in done.output
    assert "short: tested: very" in done.output
    assert "average accuracy" in done.output
    assert str(out) in done.output.replace("\n", "")
    config = json.loads((out / "config.json").read_text())["config"]
    assert (config["seed"], config["training"]["steps"]) == (1, 2)
    again = invoke("resume", str(out))
    assert again.exit_code == 0
    assert "is finished; nothing is left to do" in again.output
    nothing = invoke("resume", str(run_file.parent))
    assert (nothing.exit_code, "is no run directory" in nothing.output) == (2, True)
    refused = invoke("train", str(run_file), f"out={out}")
    assert refused.exit_code == 2
    assert "is not empty" in refused.output


def test_a_run_goes_on_from_any_folder(
    tmp_path: Path, run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = run_file.read_text()
    run_file.write_text(text.replace(f"{tmp_path}/", ""))  # every path starts at the file's folder
    assert str(tmp_path) not in run_file.read_text()
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(Run, "_certify", interrupt)
    stopped = invoke("train", "../run.yaml", "out=../run")
    assert stopped.exit_code == 130, stopped.output
    described = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert described == run_config(tmp_path).model_dump(mode="json")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path / "there")
    done = invoke("resume", "../run")
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["config"] == described


def test_a_broken_constraint_is_a_negative_verdict(run_file: Path) -> None:
    done = invoke("train", str(run_file), "sculpt.engine=gradient")
    assert done.exit_code == 1
    assert done.output.count("error:") == 0
    assert "The constraint is BROKEN for 14 matrices of task 'short'. Worst leak" in done.output
    assert RunDirectory(run_file.parent / "run").status() == "finished"


def test_a_run_that_is_stopped_before_it_begins_has_nothing_to_go_on_with(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sculpt.runs.prepare.load_learner", interrupt)
    for command in (["train"], ["train", "--dry-run"]):
        stopped = invoke(*command, str(run_file))
        assert stopped.exit_code == 130
        assert stopped.output == "stopped\n"
    assert not (run_file.parent / "run").exists()


def test_a_dry_run_shows_everything_and_writes_nothing(run_file: Path) -> None:
    done = invoke("train", str(run_file), "--dry-run")
    assert done.exit_code == 0, done.output
    for words in (
        f"model: {run_file.parent / 'tiny'}",
        f"short: test: {run_file.parent / 'short-test.jsonl'}",
        "question, answer",
        "q_proj",
        "32 x 32",
        "weights",
        "disk: checkpoints",
        "one step of 2 rows",
        "subspaces, all tasks",
        "certificates, all tasks",
    ):
        assert words in done.output, words
    out = run_file.parent / "run"
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").touch()
    refused = invoke("train", str(run_file), "--dry-run")
    assert refused.exit_code == 2
    assert "is not empty" in refused.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["training.stepss=3"], "unknown field 'training.stepss'; did you mean 'steps'?"),
        (["model=nowhere"], f"model='{Path.cwd()}/nowhere' does not exist; expected"),
        (["sculpt.target_modules=[nothing]"], "matches nothing; the model's linear layers end in"),
        (["training.max_tokens=4"], "do not fit into max_tokens=4"),
        (["device=tpu9"], "device='tpu9' cannot be used"),
        (["evaluation.lm_eval=[piqa]"], "lm-eval is not installed"),
        (["model_kind=seq2seq"], "AutoModelForSeq2SeqLM cannot read it"),
    ],
)
def test_a_mistake_is_named_before_anything_is_written(
    run_file: Path, arguments: list[str], message: str
) -> None:
    done = invoke("train", str(run_file), *arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output
    assert not (run_file.parent / "run").exists()


def test_bad_rows_stop_or_are_counted_and_listed(run_file: Path) -> None:
    data = run_file.parent / "very-train.jsonl"
    data.write_text(data.read_text() + '{"text": "no label"}\n')
    stopped = invoke("train", str(run_file))
    assert stopped.exit_code == 2
    assert "very-train.jsonl:5: no 'label'" in stopped.output
    assert "--skip-bad-rows" in stopped.output
    done = invoke("train", str(run_file), "--skip-bad-rows")
    assert done.exit_code == 0, done.output
    assert "1 rows left out" in done.output
    described: dict[str, Any] = json.loads((run_file.parent / "run" / "config.json").read_text())
    assert len(described["rows_left_out"]) == 1
    assert "very-train.jsonl:5" in described["rows_left_out"][0]


def test_a_row_that_cannot_be_cut_to_fit_is_a_bad_row(run_file: Path) -> None:
    short, long = ({"prompt": "is it good ?", "answer": " ".join(["very"] * n)} for n in (1, 40))
    train = write_lines(run_file.parent / "train.jsonl", [short, long, short])
    test = write_lines(run_file.parent / "test.jsonl", [short | {"prompt": "is it bad ?"}])
    task = json.dumps([{"name": "t", "train": str(train), "test": str(test)}])
    call = ("train", str(run_file), f"data.tasks={task}", "training.max_tokens=20", "--dry-run")
    stopped = invoke(*call)
    assert stopped.exit_code == 2
    assert "train.jsonl:2: " in stopped.output
    done = invoke(*call, "--skip-bad-rows")
    assert done.exit_code == 0, done.output
    assert "1 rows left out" in done.output
