"""Tasks from files: every layout, every folder, and every way a row can be wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_runs import write_lines

from sculpt.data.config import DataConfig, TaskConfig
from sculpt.data.examples import DataError, Example, Message, Task
from sculpt.data.folders import ORDERS, folder_tasks
from sculpt.data.layouts import examples_of, split_question
from sculpt.data.rows import BadRows, read_rows
from sculpt.data.tasks import read_tasks
from sculpt.messages import SculptWarning


def read(path: Path, *, skip: bool = False, **options: Any) -> tuple[list[Example], list[str]]:
    bad = BadRows(skip)
    task = TaskConfig(name="task", train=path, **options)
    return examples_of(read_rows(path, bad), task, bad), bad.found


ANSWER = {"prompt": "Is it good?\nThe film.\nAnswer:", "answer": "yes"}


def test_prompt_and_answer(tmp_path: Path) -> None:
    expected = Example("Is it good?\nThe film.", "yes", "\nAnswer:")
    lines = write_lines(tmp_path / "a.jsonl", [ANSWER, ANSWER])
    listed = tmp_path / "a.json"
    listed.write_text(json.dumps([ANSWER, ANSWER], indent=2))
    for path in (lines, listed):
        assert read(path)[0] == [expected, expected]
    assert [e.where for e in read(lines)[0]] == [f"{lines}:1", f"{lines}:2"]
    assert [e.where for e in read(listed)[0]] == [f"{listed}:2", f"{listed}:6"]


def test_chat_and_document(tmp_path: Path) -> None:
    turns = [("system", "be brief"), ("user", "good?"), ("assistant", "yes")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (example,) = read(write_lines(tmp_path / "a.jsonl", [row]))[0]
    assert example == Example(messages=tuple(Message(*turn) for turn in turns))
    assert example.wanted == "yes"
    (example,) = read(write_lines(tmp_path / "a.jsonl", [{"document": "All of this."}]))[0]
    assert example == Example(answer="All of this.")
    assert example.is_document


def test_csv_with_columns_of_its_own_and_rows_of_several_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('\ufeffreview,stars\n"one, two\nthree",5\nplain,1\n', encoding="utf-8")
    fields = {"text": "review", "label": "stars"}
    examples, _ = read(path, fields=fields, suffix="\nStars:", labels=("1", "5"))
    assert examples == [
        Example("one, two\nthree", "5", "\nStars:"),
        Example("plain", "1", "\nStars:"),
    ]
    assert [e.where for e in examples] == [f"{path}:2", f"{path}:4"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_only_ends_of_lines_end_a_row(tmp_path: Path, name: str, end: str) -> None:
    path = tmp_path / name
    inner = "a\x0bb\x0cc\x1cd\x1de\x1ef\x85g\u2028h\u2029i"
    rows = [{"prompt": f"{number} {inner}", "answer": "x"} for number in range(2)]
    text = {
        "a.csv": lambda: end.join(["prompt,answer", *(",".join(row.values()) for row in rows)]),
        "a.json": lambda: json.dumps(rows, ensure_ascii=False, indent=1).replace("\n", end),
        "a.jsonl": lambda: "\n".join(
            json.dumps(row, ensure_ascii=False) + end.removesuffix("\n") for row in rows
        ),
    }
    path.write_bytes(text[name]().encode())
    assert read(path)[0] == [Example(row["prompt"], "x") for row in rows]


def test_csv_rows_may_be_long_and_columns_without_a_name(tmp_path: Path) -> None:
    path, document = tmp_path / "a.csv", "word " * 30_000 + "end"
    path.write_text(f"document,,\n{document},,\n")
    assert read(path)[0] == [Example(answer=document)]


@pytest.mark.parametrize(
    ("prompt", "text", "suffix"),
    [
        ("one\ntwo\nAnswer:", "one\ntwo", "\nAnswer:"),
        ("one\ntwo\nAnswer: \n", "one\ntwo", "\nAnswer: \n"),
        ("all on one line. Answer:", "all on one line.", " Answer:"),
        ("short\na much longer last line. Answer:", "short\na much longer last line.", " Answer:"),
        ("no question", "no question", ""),
    ],
)
def test_the_words_that_ask_are_told_from_the_text(prompt: str, text: str, suffix: str) -> None:
    assert split_question(prompt) == (text, suffix)


BAD_LINES = [
    ('{"prompt": "a\\nAnswer:"}', r"no 'answer', only \['prompt'\]"),
    ('{"prompt": "a", "answer": " "}', "'answer' is empty"),
    ('{"prompt": "a", "answer": ["b"]}', r"'answer' is \['b'\], expected text"),
    ('{"question": "a"}', r"values \['question'\], expected one of: messages; prompt, answer;"),
    ('{"document": "a"}', "layout 'document' in a file that began with 'answer'"),
    ('{"messages": []}', r"'messages' is \[\], expected a list"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "the last message is the user's"),
    ('{"messages": [{"role": "bot", "content": "a"}]}', "message 1 is .* expected a role, one of"),
    ('["a", "b"]', "expected an object with named values, got list"),
    ('{"prompt": "a", ', "not JSON: .* column"),
    ('{"prompt": "a", "answer": "b", "answer": "c"}', "'answer' is given twice"),
    ('{"prompt": "a", "answer": ' + "1" * 5000 + "}", "JSON that cannot be read: .* digits"),
    ("[" * 100_000, "JSON that cannot be read: maximum recursion"),
    ('{"prompt": "\udcff", "answer": "b"}', "not UTF-8 text"),
    ('{"prompt": "\\ud800", "answer": "b"}', "not UTF-8 text"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_row_is_named_or_listed(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    chat = {"messages": [{"role": role, "content": "a"} for role in ("user", "assistant")]}
    good = json.dumps(chat if "messages" in line else ANSWER)
    path.write_bytes(f"{good}\n\n{line}\n{good}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=rf"a\.jsonl:3: {reason}.*--skip-bad-rows"):
        read(path)
    examples, found = read(path, skip=True)
    assert len(examples) == 2
    assert len(found) == 1
    assert found[0].startswith(f"{path}:3: ")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", "", "the file is empty"),
        ("a.txt", "x", r"expected a file that ends in one of \.jsonl"),
        ("a.json", '{"prompt": "a"}', "a.json:1: expected a JSON list"),
        ("a.json", '[{"prompt": "a",\n "answer"}]', "a.json:2: not JSON"),
        ("a.json", '[{"prompt": "a",\n "answer": "b"}\n', "a.json:3: not JSON: the list ends"),
        ("a.json", "[]", "a.json: no rows"),
        ("a.json", '[\n\n{"prompt": "a",\n"prompt": "b"}]', "a.json:3: 'prompt' is given twice"),
        ("a.json", "[\n" + "[" * 100_000, "a.json:2: JSON that cannot be read: maximum recursion"),
        ("a.csv", "\na,a,b\n1,2,3\n", "a.csv:2: two columns are called 'a'"),
        ("a.csv", "prompt,answer\n\na,b\nc\n", "a.csv:4: expected 2 columns"),
        ("a.csv", "prompt,answer\na,b,c\n", "a.csv:2: expected 2 columns"),
        ("a.csv", 'prompt,answer\n"a,b\n', "a.csv:2: not CSV"),
        ("a.csv", "prompt,answer\n", "a.csv: no rows"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: str, reason: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=reason):
        read(path)
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "nothing.jsonl")


def test_an_answer_that_is_no_label_is_a_bad_row(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [ANSWER])
    with pytest.raises(DataError, match=r"a\.jsonl:1: answer 'yes' is not one of \['Yes', 'No'\]"):
        read(path, labels=("Yes", "No"))


def data_set(folder: Path, row: dict[str, str], *labels: str) -> None:
    """One as benchmarks lay it out; the name of the split stands for `{}` in each value."""
    folder.mkdir(parents=True)
    for split in ("train", "dev", "test"):
        values = {name: value.replace("{}", split) for name, value in row.items()}
        (folder / f"{split}.json").write_text(json.dumps([values]))
    if labels:
        (folder / "labels.json").write_text(json.dumps(labels))


def test_cl_benchmark_folders(tmp_path: Path) -> None:
    sentence = {"label": "Good", "sentence": "a film to {}"}
    for name in ("TC/agnews", "TC/dbpedia", "SC/amazon"):
        data_set(tmp_path / name, sentence, "Good", "Bad")
    tasks = read_tasks(DataConfig(folder=tmp_path, order=("dbpedia", "ag", "amazon")), 0)
    assert [task.name for task in tasks] == ["dbpedia", "agnews", "amazon"]
    assert tasks[0].labels == ("Good", "Bad")
    assert tasks[0].train[0].prompt == (
        "What is the topic of the following paragraph? Choose one from the option.\n"
        "Option: Good, Bad \na film to train\nAnswer:"
    )
    assert "sentiment" in tasks[2].train[0].prompt
    assert tasks[0].test[0].where.endswith("TC/dbpedia/test.json:1")


def test_trace_and_prompt_folders(tmp_path: Path) -> None:
    for name in ("C-STANCE", "MeetingBank"):
        data_set(tmp_path / "trace" / name, ANSWER | {"answer": "{}"})
    stance, meetings = read_tasks(DataConfig(folder=tmp_path / "trace"), 0)
    assert (stance.name, stance.labels, stance.measure) == ("C-STANCE", (), "exact_match")
    assert meetings.measure == "rouge_l"
    data_set(tmp_path / "prompts" / "BoolQA", ANSWER | {"answer": "{}"}, "train", "test")
    (boolq,) = read_tasks(DataConfig(folder=tmp_path / "prompts", order=("boolqa",)), 0)
    assert boolq.labels == ("train", "test")
    assert boolq.train[0].prompt == ANSWER["prompt"]


def test_presets_name_their_data_sets(tmp_path: Path) -> None:
    assert [len(ORDERS[str(number)]) for number in range(1, 7)] == [4, 4, 4, 15, 15, 15]
    assert len({frozenset(ORDERS[str(number)]) for number in (4, 5, 6)}) == 1
    for name in ORDERS["4"]:
        (tmp_path / name.upper()).mkdir()
        (tmp_path / name.upper() / "train.json").write_text(json.dumps([ANSWER]))
    for order in (1, "4", 6):
        names = [task.name.lower() for task in folder_tasks(tmp_path, order)]
        assert names == list(ORDERS[str(order)])
    with pytest.raises(DataError, match=r"order names 'C-STANCE', which is not in .*only: AG"):
        folder_tasks(tmp_path, "trace")
    with pytest.raises(DataError, match="order=7, expected one of 1, 2, 3"):
        folder_tasks(tmp_path, 7)
    with pytest.raises(DataError, match="no such folder"):
        folder_tasks(tmp_path / "nothing", None)
    with pytest.raises(DataError, match="no data set there"):
        folder_tasks(tmp_path / "MNLI", None)


NUMBERED = [{"prompt": f"number {number}\nAnswer:", "answer": "x"} for number in range(20)]


def task_of(train: Path, test: Path | None = None, **data: Any) -> Task:
    config = TaskConfig(name="t", train=train, test=test)
    (task,) = read_tasks(DataConfig(tasks=(config,), **data), 0)
    return task


def test_rows_are_held_out_and_drawn_by_the_seed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", NUMBERED)
    task = task_of(path, holdout=0.25, train_rows=10, test_rows=4)
    assert (len(task.train), len(task.test)) == (10, 4)
    assert not set(task.train) & set(task.test)
    assert task == task_of(path, holdout=0.25, train_rows=10, test_rows=4)
    with pytest.raises(DataError, match="1 rows are too few to hold out"):
        task_of(write_lines(path, NUMBERED[:1]))


def test_a_task_is_not_tested_on_the_file_that_trains_it(tmp_path: Path) -> None:
    train, test = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_lines(train, [ANSWER])
    for make in (test.symlink_to, test.hardlink_to):
        make(train)
        with pytest.raises(DataError, match=r"'t' .*train=\S+a\.jsonl, test=\S+b\.jsonl"):
            task_of(train, test)
        test.unlink()
    with pytest.raises(DataError, match=r"train=\S+a\.jsonl, test=\S+a\.jsonl"):
        task_of(train, train)


def test_test_rows_that_are_trained_on_are_counted(tmp_path: Path) -> None:
    rows = NUMBERED
    train = write_lines(tmp_path / "a.jsonl", rows)
    test = write_lines(tmp_path / "b.jsonl", [ANSWER, *rows[3:5], rows[3] | {"answer": "y"}])
    with pytest.warns(SculptWarning, match=r"2 of 4 test .* 't' .*b\.jsonl:2, .*a\.jsonl:4"):
        task_of(train, test)
    with pytest.warns(SculptWarning, match=r"\d of 6 test rows of task 't' are training rows too"):
        task_of(write_lines(tmp_path / "c.jsonl", rows * 3))
    first = TaskConfig(name="first", train=write_lines(tmp_path / "d.jsonl", [ANSWER]), test=test)
    other = write_lines(tmp_path / "e.jsonl", [ANSWER | {"answer": "y"}])
    both = DataConfig(tasks=(first, TaskConfig(name="t", train=train, test=other)))
    with pytest.warns(SculptWarning, match=r"3 of 4 test rows of task 'first' .*d\.jsonl:1"):
        read_tasks(both, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ("a", "a")}, "two or more"),
        ({"labels": ("a", " ")}, "empty label"),
        ({"train": ()}, "train is empty"),
        ({"labels": (), "measure": "choice"}, "needs labels to choose from"),
    ],
)
def test_task_refuses_what_cannot_be(change: dict[str, Any], message: str) -> None:
    one = (Example("x", "a"),)
    with pytest.raises(DataError, match=message):
        Task(**({"name": "n", "labels": ("a", "b"), "train": one, "test": one} | change))


def test_a_saved_dataset_is_read_by_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class DatasetDict(dict[str, Any]):
        """Stands in for several splits."""

    tables = {"one": [ANSWER, {"prompt": "a"}], "all": DatasetDict(train=[ANSWER])}
    module = ModuleType("datasets")
    module.DatasetDict = DatasetDict  # type: ignore[attr-defined]
    module.load_from_disk = lambda path: tables[Path(path).name]  # type: ignore[attr-defined]
    for name in tables:
        (tmp_path / name).mkdir()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"one is a folder: .*pip install datasets"):
        read(tmp_path / "one")
    monkeypatch.setitem(sys.modules, "datasets", module)
    with pytest.raises(DataError, match=r"one: row 1: no 'answer'"):
        read(tmp_path / "one")
    assert [e.answer for e in read(tmp_path / "one", skip=True)[0]] == ["yes"]
    with pytest.raises(DataError, match=r"all holds the splits \['train'\]: name one"):
        read(tmp_path / "all")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_other_encodings_are_named(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.jsonl"
    mark = "" if encoding == "utf-16" else "\ufeff"
    path.write_text(mark + json.dumps(ANSWER), encoding=encoding)
    with pytest.raises(DataError, match=r"a\.jsonl:1: UTF-16 text; save it as UTF-8"):
        read(path)
