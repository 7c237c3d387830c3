"""The interface of methods: what a class must be, what it can be told, and one of a stranger."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import run_config, run_until, run_values

from sculpt.runs import method
from sculpt.runs.config import RunConfig
from sculpt.runs.directory import RunError
from sculpt.runs.methods import METHODS, method_class
from sculpt.runs.prepare import Prepared
from sculpt.runs.start import resume, run
from sculpt.runs.yaml_file import ConfigError, read_config

EXAMPLE = "last:LastMatrices"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with the example of the interface's description, as for a command."""
    assert method.__doc__ is not None
    _, begin, rest = method.__doc__.partition("    from sculpt")
    source = textwrap.dedent(begin + rest.partition("\nEverything else")[0])
    assert len(source.splitlines()) <= 40
    (tmp_path / "last.py").write_text(source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield tmp_path
    sys.modules.pop("last", None)


def changed(config: RunConfig) -> set[str]:
    before = load_file(config.model / "model.safetensors")
    after = load_file(config.out / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_the_example_trains_what_it_says_and_is_resumed_with_the_same_bits(folder: Path) -> None:
    changes = {"method": EXAMPLE, "options": {"count": 2}, "checkpoint": {"every_steps": 1}}
    config = run_config(folder, **changes)
    whole = run(config).methods[EXAMPLE]
    last = [target.name for target in Prepared(config).strategy.targets[-2:]]
    assert changed(config) == {f"{name}.weight" for name in last}

    again = config.model_copy(update={"out": folder / "again"})
    run_until(again, lambda now: (now.task, now.phase, now.done) == ("short", "train", 2))
    described = json.loads((again.out / "config.json").read_text())["config"]
    assert (described["method"], described["options"]) == (EXAMPLE, {"count": 2})
    results = resume(again.out)
    assert results is not None
    assert results.methods[EXAMPLE].losses == whole.losses
    ends = [load_file(c.out / "model" / "model.safetensors") for c in (config, again)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_run_whose_class_is_gone_says_so_in_one_line(folder: Path) -> None:
    config = run_config(folder, method=EXAMPLE)
    run(config)
    (folder / "last.py").unlink()
    sys.modules.pop("last")
    with pytest.raises(RunError, match=r"last cannot be imported: ModuleNotFoundError") as raised:
        resume(config.out)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sculp", "expected one of sculpt, plain, multitask, or the import path of a class, such "
         "as package.module:Class; did you mean 'sculpt'?"),
        ("last", "expected one of"),
        ("last:", "expected one of"),
        ("lost:LastMatrices", "lost cannot be imported: ModuleNotFoundError: No module"),
        ("broken:LastMatrices", "broken cannot be imported: SyntaxError: "),
        ("last:LastMatrix", "last has no class LastMatrix; did you mean 'LastMatrices'?"),
        ("last:Section", "Section is no subclass of sculpt.runs.method.Strategy"),
        ("last:Strategy", "Strategy does not define begin_task, end_task"),
    ],
)  # fmt: skip
def test_what_is_no_method_is_named_with_its_line(folder: Path, name: str, message: str) -> None:
    (folder / "broken.py").write_text("class LastMatrices(:\n", encoding="utf-8")
    found = problem(folder, f"method: '{name}'")
    assert found.startswith(f"run.yaml:4: method={name!r}: {message}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{coumt: 2}", "unknown field 'options.coumt'; did you mean 'count'?"),
        ("{count: two}", "options.count='two': input should be a valid integer"),
        ("3", "options=3: input should be a valid dictionary"),
    ],
)
def test_a_slip_in_options_is_named_with_its_line(folder: Path, options: str, message: str) -> None:
    found = problem(folder, f"method: {EXAMPLE}\noptions: {options}")
    assert found.startswith(f"run.yaml:5: {message}")


def test_methods_without_options_take_none(folder: Path) -> None:
    assert problem(folder, "options: {count: 1}") == "run.yaml:4: unknown field 'options.count'"
    assert all(method_class(name).Options is method.Section for name in METHODS)


def problem(folder: Path, text: str) -> str:
    """What is wrong with a run that says this; one line."""
    path = folder / "run.yaml"
    path.write_text(f"model: m\nout: o\ndata: {{builtin: demo}}\n{text}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        read_config(path.relative_to(folder))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_paths_in_options_start_at_the_file(folder: Path) -> None:
    source = """
        from sculpt.data.config import FilePath
        from sculpt.runs.method import Section
        from sculpt.runs.plain import Plain

        class Reads(Plain):
            class Options(Section):
                rows: FilePath
    """
    (folder / "reads.py").write_text(textwrap.dedent(source), encoding="utf-8")
    values = run_values(folder, method="reads:Reads", options={"rows": "kept.jsonl"})
    (folder / "sub").mkdir()
    (folder / "sub" / "run.yaml").write_text(json.dumps(values), encoding="utf-8")
    assert read_config(Path("sub/run.yaml")).options.rows == folder / "sub" / "kept.jsonl"
    del values["options"]
    (folder / "sub" / "run.yaml").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"the field 'options\.rows' is missing"):
        read_config(Path("sub/run.yaml"))


def test_multitask_sees_all_tasks_in_every_phase_and_each_row_once(tmp_path: Path) -> None:
    training = {"epochs": 1, "batch_size": 2, "lr": 1e-3}
    strategy = Prepared(run_config(tmp_path, method="multitask", training=training)).strategy
    rows = [[row.ids for row in of_task] for of_task in strategy.setting.rows]
    seen = []
    for task in (0, 1):
        steps = strategy.steps(task)
        assert steps == 2
        phase = islice(strategy.batches(task, skip=0), steps)
        seen += [row.ids for row in chain.from_iterable(phase)]
    assert sorted(seen) == sorted(chain(*rows))
    start = chain.from_iterable(islice(strategy.batches(0, skip=0), 2))
    assert {row.ids in rows[0] for row in start} == {True, False}
