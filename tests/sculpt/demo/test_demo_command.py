"""`sculpt demo` as a user runs it, on a tiny model directory: results, refusals, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_language import tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from sculpt.cli.app import app
from sculpt.demo.general import GENERAL, general_loss
from sculpt.demo.settings import (
    MAX_TEXT_TOKENS,
    METHODS,
    TEST_PER_TASK,
    DemoError,
    DemoSettings,
    check_space,
)
from sculpt.demo.tasks import demo_tasks
from sculpt.models.causal import CausalLearner
from sculpt.runs.directory import RunDirectory, RunError, check_out

COMMAND = [sys.executable, "-m", "sculpt.cli.app", "demo"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    CausalLearner(tiny_model(), tiny_tokenizer()).save(folder)
    return folder


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run directory and output of a whole demo."""
    out = tmp_path_factory.mktemp("runs") / "one"
    command = [*COMMAND, "--model", str(model), "--out", str(out), "--steps", "3", "--lr", "0.01"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_a_run_leaves_everything_it_promises(finished: tuple[Path, str]) -> None:
    out, _ = finished
    names = ["config.json", "matrix.png", "model", "results.json", "status.json", *METHODS]
    assert {path.name for path in out.iterdir()} == set(names)
    assert not any((out / method / "model").exists() for method in METHODS)
    assert json.loads((out / "status.json").read_text())["state"] == "finished"
    assert (out / "matrix.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "results.json").read_text())
    assert results["config"] == json.loads((out / "config.json").read_text())
    assert results["versions"]["torch"]
    assert list(results["methods"]) == ["plain 2e-5", "plain 1e-2", "sculpt (weights)", "sculpt"]
    low, plain, weights, sculpt = results["methods"].values()
    for method in (low, plain, weights, sculpt):
        for accuracy in ("generated", "among_labels"):
            for task, row in enumerate(method[accuracy]):
                assert [x is None for x in row] == [later > task for later in range(3)]
        assert [len(row) for row in method["losses"]] == [3, 3, 3]
        assert method["peak_memory_bytes"] > 50 * 2**20
        assert method["step_seconds"] > 0
        assert method["general_scores"]["before"] == low["general_scores"]["before"]
    assert abs(changed(low)) < abs(changed(plain))
    assert plain["certificates"] == []
    for method, by_curvature in ((weights, False), (sculpt, True)):
        assert [c["ok"] for c in method["certificates"]] == [True, True, True]
        assert len(method["certificates"][0]["rows"]) == 14
        for row in method["subspaces"][-1]:
            assert row["method"].startswith("curvature") is by_curvature
    assert sculpt["trainable_elements"] < plain["trainable_elements"]
    assert sculpt["optimizer_state_bytes"] < plain["optimizer_state_bytes"]
    # The same model and data: the first loss, before any step, is the same.
    assert plain["losses"][0][0] == pytest.approx(sculpt["losses"][0][0], rel=1e-5)


def changed(method: dict[str, Any]) -> float:
    """By how much the loss on general text rose."""
    scores = method["general_scores"]
    return float(scores["after"][GENERAL] - scores["before"][GENERAL])


def test_the_saved_model_is_a_plain_one_with_the_reported_accuracy(
    finished: tuple[Path, str], model: Path
) -> None:
    out, _ = finished
    results = json.loads((out / "results.json").read_text())
    learner = CausalLearner.from_directory(out / "model", max_text_tokens=MAX_TEXT_TOKENS)
    before = CausalLearner.from_directory(model).model.state_dict()
    after = learner.model.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in after.items()} == {
        k: (v.shape, v.dtype) for k, v in before.items()
    }
    tasks = demo_tasks(0, test_per_task=TEST_PER_TASK)
    reported = results["methods"]["sculpt"]
    scores = [learner.score(task) for task in tasks]
    assert [s.among_labels for s in scores] == reported["among_labels"][-1]
    assert [s.generated for s in scores] == reported["generated"][-1]
    after = reported["general_scores"]["after"][GENERAL]
    assert general_loss(out / "model", encoder=False) == pytest.approx(after, rel=1e-5)


def test_output_is_readable_without_a_terminal(finished: tuple[Path, str]) -> None:
    _, text = finished
    assert "\x1b" not in text
    assert re.search(
        r"plain 1e-2 +BBC topic: step 3/3 +loss \d+\.\d+ +[\d,]+ tokens/s +ETA \d+:\d\d", text
    )
    assert "sculpt            movie verdict: tested: BBC topic" in text
    for words in ("average accuracy", "forgetting", "learned accuracy", GENERAL, "worst leak"):
        assert words in text
    assert "peak memory" in text
    assert "optimizer state" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratio", "0.0"], "unfreeze_rank_ratio=0.0 trains nothing"),
        (["--ratio", "1"], "unfreeze_rank_ratio=1.0 preserves nothing"),
        (["--ratio", "-0.5"], "strictly between 0.0 and 1.0"),
        (["--steps", "0"], "steps=0"),
        (["--lr", "0"], "lr=0.0"),
        (["--seed", "-1"], "--seed -1"),
        (["--methods", "plain,lora"], "--methods plain,lora: expected some of plain-low,plain,"),
        (["--methods", ""], "expected some of"),
        (["--quick", "--model", "."], "exclude each other"),
        (["--model", "no/such/place"], "model='no/such/place' does not exist"),
    ],
)
def test_bad_input_is_refused_before_anything(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCULPT_CACHE", str(tmp_path / "cache"))
    result = CliRunner().invoke(app, ["demo", "--out", "run", *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert list(tmp_path.iterdir()) == []


def test_out_must_be_a_new_or_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out, message in (
        (tmp_path, "is not empty"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "below", "cannot be written"),
    ):
        with pytest.raises(RunError, match=message):
            check_out(out)
        result = CliRunner().invoke(app, ["demo", "--out", str(out)])
        assert (result.exit_code, message in result.output) == (2, True)
    check_out(tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (3, 1), (30, 5)])
def test_a_short_run_still_reaches_the_full_rate(tmp_path: Path, steps: int, warmup: int) -> None:
    for run in DemoSettings(out=tmp_path, steps=steps).runs(tmp_path).values():
        assert run.training.warmup_steps == warmup
        assert run.training.factor(steps, steps) == 1.0


def test_a_full_disk_is_seen_before_training(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_space(tmp_path / "run", model)

    class Usage:
        free = 2**20

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(DemoError, match=r"1 MB are free on its disk, about \d+ MB are needed"):
        check_space(tmp_path / "run", model)


def test_a_disk_that_fills_up_while_saving_leaves_no_half_model(tmp_path: Path) -> None:
    class Full(CausalLearner):
        def save(self, path: Path) -> None:
            (path / "config.json").touch()
            raise OSError(28, "No space left on device")

    learner = Full(tiny_model(), tiny_tokenizer())
    with pytest.raises(RunError, match=r"could not be saved to .*No space left"):
        RunDirectory(tmp_path).save_model("model", learner.save)
    assert list(tmp_path.iterdir()) == []


def interrupted(model: Path, out: Path, stop: int) -> tuple[int, str, dict[str, Any]]:
    """Exit code, errors and status of a run that gets the signal `stop` in its first steps."""
    command = [*COMMAND, "--model", str(model), "--out", str(out), "--steps", "100000"]
    command += ["--methods", "plain"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
        # A background job of a shell ignores Ctrl-C, and so would the command it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "step 1/" in line:
            # A terminal sends Ctrl-C to all processes of the command.
            (os.killpg if stop == signal.SIGINT else os.kill)(process.pid, stop)
            break
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors, json.loads((out / "status.json").read_text())


@pytest.mark.parametrize(("stop", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_where_it_stopped(
    model: Path, tmp_path: Path, stop: int, expected: int
) -> None:
    code, errors, status = interrupted(model, tmp_path / "run", stop)
    assert code == expected
    assert "Traceback" not in errors
    assert "stopped; in plain 6e-5, BBC topic, train" in errors
    assert status["state"] == "interrupted"
    assert (status["method"], status["task"]) == ("plain 6e-5", "BBC topic")
    assert status["phase"] == "train"
    assert 1 <= status["step"] < status["of"] == 100000
    assert RunDirectory(tmp_path / "run" / "plain").status() == "interrupted"
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["config.json", "plain", "status.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the mask of a process from /proc")
def test_a_worker_does_not_hear_ctrl_c_from_its_first_instant() -> None:
    code = (
        "import signal, time\n"
        "from multiprocessing import get_context\n"
        "from pathlib import Path\n"
        "from sculpt.demo.run import _start_without_sigint\n"
        "process = get_context('spawn').Process(target=time.sleep, args=(60,))\n"
        "_start_without_sigint(process)\n"
        "status = Path(f'/proc/{process.pid}/status').read_text()\n"
        "process.kill()\n"
        "print(int(status.split('SigBlk:')[1].split()[0], 16) >> signal.SIGINT - 1 & 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_help_and_version_load_nothing_heavy() -> None:
    code = (
        "import sys\nfrom sculpt.cli.app import app\n"
        "print([m for m in ('transformers', 'matplotlib', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    result = CliRunner().invoke(app, ["--version"])
    assert result.output.startswith("sculpt ")
