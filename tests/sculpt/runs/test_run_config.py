"""Every mistake in a YAML file is named by field and line, with the nearest valid name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from sculpt.config import SculptConfig
from sculpt.runs.config import RunConfig
from sculpt.runs.yaml_file import ConfigError, read_config

GOOD = """\
model: some/model
out: runs/one
method: sculpt
seed: 3
data:
  tasks:
    - name: first
      train: a.jsonl
      labels: [good, bad]
    - name: second
      train: b.csv
      fields: {text: review, label: stars}
training:
  steps: 10
  lr: 1e-5
  betas: [0.9, 0.95]
sculpt:
  unfreeze_rank_ratio: 0.5
  target_modules: [q_proj, v_proj]
evaluation:
  batch_size: 4
checkpoint:
  keep: 1
"""


def read(folder: Path, text: str, *overrides: str) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return read_config(path, overrides)


def test_a_file_becomes_a_typed_object_and_json_and_back(tmp_path: Path) -> None:
    config = read(tmp_path, GOOD)
    assert config.model == tmp_path / "some" / "model"
    assert config.training.lr == 1e-5
    assert config.training.betas == (0.9, 0.95)
    assert config.data.tasks[0].labels == ("good", "bad")
    assert config.data.tasks[1].fields == {"text": "review", "label": "stars"}
    expected = SculptConfig(unfreeze_rank_ratio=0.5, target_modules=["q_proj", "v_proj"])
    assert config.sculpt == expected
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


def test_arguments_override_the_file(tmp_path: Path) -> None:
    config = read(
        tmp_path, GOOD, "training.lr=2e-4", "data.tasks=[]", "data.folder=x", "data.order=[a, b]"
    )
    assert config.training.lr == 2e-4
    assert config.training.steps == 10
    assert config.data.order == ("a", "b")


def fields_of(text: str) -> list[tuple[int, str]]:
    """Line number and name of every field in the file."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        name = line.strip().removeprefix("- ").partition(":")[0]
        if name not in ("{text",):
            found.append((number, name))
    return found


@pytest.mark.parametrize(("line", "name"), fields_of(GOOD))
def test_a_typo_in_any_field_is_named_with_its_line(tmp_path: Path, line: int, name: str) -> None:
    lines = GOOD.splitlines()
    typo = name[:-1] + name[-1] * 2 if len(name) > 2 else name + "x"
    lines[line - 1] = lines[line - 1].replace(name + ":", typo + ":", 1)
    with pytest.raises(ConfigError) as raised:
        read(tmp_path, "\n".join(lines))
    said = [
        part
        for part in str(raised.value).splitlines()
        if f"run.yaml:{line}: " in part and typo in part
    ]
    assert said, raised.value
    assert f"did you mean {name!r}" in said[0]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 10", "steps: ten", r"run\.yaml:14: training\.steps='ten': input should be"),
        ("steps: 10", "steps: 0", r":14: training\.steps=0: input should be greater than or equal"),
        ("steps: 10", "steps: 1.5", r":14: training\.steps=1\.5: input should be a valid integer"),
        ("steps: 10", "steps: true", r":14: training\.steps=True: input should be a valid integer"),
        ("lr: 1e-5", "lr: .nan", r":15: training\.lr=nan: input should be"),
        ("lr: 1e-5", "epochs: 2", r":14: training\.steps: steps=10 and epochs=2\.0 exclude"),
        ("method: sculpt", "method: sculp", r":3: method='sculp': expected one of .*plain.*; "
         "did you mean 'sculpt'"),
        ("ratio: 0.5", "ratio: 1.0", r":18: sculpt\.unfreeze_rank_ratio: .*preserves nothing"),
        ("ratio: 0.5", "ratio: 1", r":18: sculpt\.unfreeze_rank_ratio: .*must be a float"),
        ("model: some/model\n", "", r"run\.yaml: the field 'model' is missing"),
        ("train: b.csv", "test: b.csv", r":10: the field 'data\.tasks\.1\.train' is missing"),
        ("name: second", "name: first", r"run\.yaml:\d+: data\.tasks.*two have the same name"),
        ("seed: 3", "seed: 3\nseed: 4", r"run\.yaml:5: found duplicate key"),
        ("seed: 3", "seed: [", r"run\.yaml:\d+: "),
        ("review,", "review, star: x,", r":12: data\.tasks\.1\.fields"),
        ("steps: 10", "steps: 10\n---\nseed: 4", r":15: expected a single document .* another"),
        ("labels: [good, bad]", "labels:", r":9: data\.tasks\.0\.labels is empty, expected"),
        ("seed: 3", "seed: 3\nloggers:", r":5: loggers is empty, expected a value"),
        ("seed: 3", "seed: \x0b3", r":4: the character U\+000B is not allowed"),
        ("seed: 3", "seed: !!int ten", r":4: !!int is not expected here"),
        ("seed: 3", "seed: !number 3", r":4: !number is not expected here"),
        ("labels: [good, bad]", "labels: !!set {good}", r":9: !!set is not expected here"),
        ("sculpt:\n", "options: !!omap [rank: 3]\nsculpt:\n", r":17: !!omap is not expected here"),
        ("seed: 3", "? [seed]\n: 3", r":4: expected the name of a field"),
        ("seed: 3", "3: 3", r":4: unknown field '3'"),
        ("seed: 3", "seed: *x", r":4: found undefined alias 'x'"),
        ("seed: 3", "seed: &x [*x]", r":4: the anchor 'x' contains itself"),
        ("lr: 1e-5", "<<: 3", r":15: << expects an alias of fields"),
        ("lr: 1e-5", "<<: [{lr: 1e-5}, 3]", r":15: << expects an alias of fields"),
        ("training:", "training: &x\n  <<: *x", r":13: the anchor 'x' contains itself"),
        ("seed: 3", "seed: " + "[" * 5000, r"run\.yaml: nested too deep"),
        ("model: some", "model: ~no-such-user", r":1: model='~no-such-user/model': there is no su"),
        ("out: runs/one", "out: [runs]", r":2: out: expected a path"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_its_line(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, GOOD.replace(old, new, 1))


MERGED = """\
model: m
out: o
data:
  tasks:
    - &first
      name: first
      train: a.jsonl
      labels: [good, bad]
      measure: choice
    - <<: *first
      name: second
      labels: [yes, no]
training: &pace
  steps: 10
  lr: 1e-5
evaluation: {<<: [{batch_size: 4}, {batch_size: 5, max_new_tokens: 6}], lm_eval_limit: &few 7}
sculpt:
  seed: *few
  rank_pattern: {<<: {q_proj: 2, v_proj: 3}, q_proj: 4}
"""


def test_merge_keys_anchors_and_aliases(tmp_path: Path) -> None:
    config = read(tmp_path, MERGED)
    first, second = config.data.tasks
    assert (first.name, second.name) == ("first", "second")
    assert (first.labels, second.labels) == (("good", "bad"), ("yes", "no"))
    assert first.train == second.train == tmp_path / "a.jsonl"
    assert first.measure == second.measure == "choice"
    assert config.evaluation.batch_size == 4
    assert (config.evaluation.max_new_tokens, config.evaluation.lm_eval_limit) == (6, 7)
    assert config.sculpt.seed == 7
    assert config.sculpt.rank_pattern == {"q_proj": 4, "v_proj": 3}
    # An argument changes what is merged in one place only.
    config = read(tmp_path, MERGED.replace("steps: 10", "steps: 10\n  betas: &b [0.1, 0.2]"))
    assert config.training.betas == (0.1, 0.2)
    config = read(tmp_path, MERGED, "evaluation.max_new_tokens=8", "sculpt.rank_pattern.v_proj=9")
    assert (config.evaluation.batch_size, config.evaluation.max_new_tokens) == (4, 8)
    assert config.sculpt.rank_pattern == {"q_proj": 4, "v_proj": 9}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("measure: choice", "measure: choise", r"run\.yaml:9: data\.tasks\.1\.measure='choise'"),
        ("labels: [yes, no]", "labels: 3", r"run\.yaml:12: data\.tasks\.1\.labels=3"),
        ("labels: [good, bad]", "label: [good]", r"run\.yaml:8: unknown .*tasks\.1\.label'"),
        ("{batch_size: 4}", "{batch_size: 0}", r"run\.yaml:16: evaluation\.batch_size=0"),
        ("sculpt:", "checkpoint: {<<: *pace}\nsculpt:", r":14: unknown .*checkpoint\.steps"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_merged_values_is_named_with_its_line(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in MERGED
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, MERGED.replace(old, new, 1))


@pytest.mark.parametrize("name", ["2026-01-31", "2026-01-31 12:30:00", "=", "<<", "yes", "'3'"])
def test_names_that_look_like_something_else_to_yaml(tmp_path: Path, name: str) -> None:
    config = read(tmp_path, GOOD.replace("name: first", f"name: {name}"))
    assert config.data.tasks[0].name == name.strip("'")


def test_paths_start_where_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_folder, current, home = tmp_path / "configs", tmp_path / "current", tmp_path / "home"
    for folder in (file_folder, current, home):
        folder.mkdir()
    monkeypatch.chdir(current)
    monkeypatch.setenv("HOME", str(home))
    text = GOOD.replace("some/model", "~/model").replace("a.jsonl", "../data/a.jsonl")
    config = read(file_folder, text, "out=../out")
    assert config.model == home / "model"
    assert config.out == tmp_path / "out"
    assert [task.train for task in config.data.tasks] == [
        tmp_path / "data" / "a.jsonl",
        file_folder / "b.csv",
    ]
    assert read_config(Path("../configs/run.yaml"), ["out=../out"]) == config
    both = read(file_folder, GOOD, "data.tasks=[{name: t, train: ~/c.csv, test: d.csv}]")
    (task,) = both.data.tasks
    assert (task.train, task.test) == (home / "c.csv", current / "d.csv")
    data = {"folder": "x", "order": ["a", "b"]}
    values: dict[str, Any] = {"model": "m", "out": Path("~/o"), "data": data}
    config = RunConfig.model_validate(values)
    assert (config.model, config.out) == (current / "m", home / "o")
    assert config.data.folder == current / "x"
    assert config.data.order == ("a", "b")


def test_paths_beside_links_and_in_pipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "far" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "inner")
    config = read(tmp_path, GOOD, f"model={tmp_path}/link/../m", f"out={tmp_path}/link/o")
    assert config.model == (tmp_path / "far" / "m").resolve()  # and not the `m` beside the link
    assert config.out == tmp_path / "link" / "o"
    monkeypatch.chdir(tmp_path)
    reading, writing = os.pipe()
    os.write(writing, GOOD.encode())
    os.close(writing)
    try:
        assert read_config(Path(f"/dev/fd/{reading}")).out == tmp_path / "runs" / "one"
    finally:
        os.close(reading)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("training.lrr=1", r"argument 'training\.lrr=1': unknown field .*did you mean 'lr'"),
        ("training.lr=fast", r"argument 'training\.lr=fast': training\.lr='fast'"),
        ("training.lr", "expected key=value"),
        ("seed.x=1", r"'seed\.x=1': seed holds 3, no fields"),
        ("seed=[", r"argument 'seed=\[':1: "),
        ("seed=!!set {a}", r"argument 'seed=!!set \{a\}':1: !!set is not expected here"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path: Path, argument: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, GOOD, argument)


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b"])
def test_a_file_without_fields_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="expected fields such as"):
        read(tmp_path, text)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        read_config(tmp_path / "none.yaml")


def test_what_is_no_text_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(GOOD.replace("first", "première").encode("latin-1"))
    with pytest.raises(ConfigError, match=r"run\.yaml:7: not UTF-8 text"):
        read_config(path)
    path.write_text(GOOD, encoding="utf-8-sig")
    assert read_config(path) == read(tmp_path, GOOD)


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("steps: 10", "stepss: 10").replace("keep: 1", "keep: -1")
    with pytest.raises(ConfigError) as raised:
        read(tmp_path, text)
    assert len(str(raised.value).splitlines()) == 2


@pytest.mark.parametrize(
    "data", [{}, {"builtin": "demo", "folder": "x"}, {"builtin": "demo", "order": "1"}]
)
def test_data_come_from_one_place(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"exactly one of tasks|order needs folder"):
        RunConfig.model_validate({"model": "m", "out": "o", "data": data})


def test_certificates_that_a_later_task_could_not_have_are_refused_before_the_first(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD.replace("sculpt:\n", "sculpt:\n  subspaces: weights\n"))
    path.write_text(path.read_text() + "certificate: independent\n")
    assert read_config(path).certificate == "independent"
    path.write_text(GOOD + "certificate: independent\n")
    with pytest.raises(ConfigError, match="use certificate='complement'"):
        read_config(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sculpt": {"subspaces": "curvature"}}, "name the memory of an earlier run"),
        ({"sculpt": {"subspaces": "weights"}, "memory": "m"}, "'weights' does not ask for"),
        (
            {"sculpt": {"subspaces": "weights"}, "checkpoint": {"memory": True}},
            "'weights' does not ask for",
        ),
        ({"method": "plain", "memory": "m"}, "memory is for method='sculpt'; got method='plain'"),
        ({"method": "plain", "checkpoint": {"memory": True}}, "checkpoint.memory is for method"),
    ],
)
def test_memory_that_nothing_uses_or_lacks_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    values = {"model": "m", "out": "o", "data": {"builtin": "demo"}}
    with pytest.raises(ValueError, match=message):
        RunConfig.model_validate(values | changes)
    plain = {"method": "plain", "certificate": "independent"}
    assert RunConfig.model_validate(values | plain).certificate == "independent"
