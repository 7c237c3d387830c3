"""Runs the examples of README.md and docs/, and follows their links, so that they cannot go stale.

The ```python blocks of a file run from top to bottom in one namespace, in an empty folder. A block
that cannot run here says so in its fence: ```python no-run; one that needs a package is skipped
without it: ```python needs-peft
"""

from __future__ import annotations

import re
import shlex
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ruamel.yaml import YAML
from tiny_runs import save_tiny_model
from typer.testing import CliRunner

import sculpt
import sculpt_kernels
from sculpt.cli.app import app
from sculpt.data.config import DataConfig, TaskConfig
from sculpt.runs.config import RunConfig
from sculpt.runs.yaml_file import read_config

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
DOCUMENTS = sorted([*ROOT.glob("README.md"), *DOCS.glob("**/*.md")])
PAGES = [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "bench/README.md"]
FENCED = re.compile(r"(?ms)^ *(?P<ticks>`{3,})(?P<info>[^`\n]*)\n(?P<code>.*?)^ *(?P=ticks)$")


class Block(NamedTuple):
    """One fenced block: its info string, and the line of the file its code starts at."""

    info: str
    line: int
    code: str

    @property
    def runs(self) -> bool:
        words = self.info.split()
        return words[:1] in (["python"], ["py"]) and "no-run" not in words

    @property
    def needs(self) -> list[str]:
        """Packages without which it is skipped."""
        words = self.info.split()
        return [word.removeprefix("needs-") for word in words if word.startswith("needs-")]


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text; one that is never closed is an error."""
    if left := re.search(r"(?m)^ *```.*$", FENCED.sub("", text)):
        raise ValueError(f"the block {left[0]!r} is never closed")
    return [
        Block(
            found["info"].strip(),
            text.count("\n", 0, found.start("code")) + 1,
            textwrap.dedent(found["code"]),
        )
        for found in FENCED.finditer(text)
    ]


def execute(text: str, name: str) -> int:
    """Run the examples of a Markdown text and count them; tracebacks show the lines of the text."""
    namespace: dict[str, object] = {"__name__": "__example__"}
    runnable = [block for block in blocks(text) if block.runs]
    for block in runnable:
        for package in block.needs:
            pytest.importorskip(package)
        exec(compile("\n" * (block.line - 1) + block.code, name, "exec"), namespace)
    return len(runnable)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    execute(path.read_text(encoding="utf-8"), str(path))


SAMPLE = """\
Text with `code`.

```python
numbers = [1, 2]
```

- in a list:

  ```python
  numbers.append(3)
  ```

```python no-run
train_for_a_week()
```

````markdown
```python
not_an_example()
```
````

```py
assert sum(numbers) == 6
```
"""


def test_blocks_share_a_namespace_and_marked_ones_are_left_out() -> None:
    assert [block.runs for block in blocks(SAMPLE)] == [True, True, False, False, True]
    assert execute(SAMPLE, "sample.md") == 3


def test_an_open_block_is_an_error() -> None:
    with pytest.raises(ValueError, match="never closed"):
        blocks("a\n\n```python\nx = 1\n")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def yaml_blocks(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return [block.code for block in blocks(text) if block.info == "yaml"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_yaml_blocks_are_runs(path: Path, tmp_path: Path) -> None:
    rest = {"model": "a", "out": "b", "data": "{builtin: demo}"}
    for code in yaml_blocks(path):
        more = [
            f"{name}: {value}\n" for name, value in rest.items() if f"\n{name}:" not in "\n" + code
        ]
        file = tmp_path / "run.yaml"
        file.write_text(code + "".join(more), encoding="utf-8")
        read_config(file)


def test_the_run_file_has_every_field_with_its_default(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    [code] = yaml_blocks(DOCS / "reference/run-file.md")
    file.write_text(code, encoding="utf-8")
    found = read_config(file)
    written = YAML(typ="safe").load(code)
    data: dict[str, Any] = {"folder": "c"}
    default = RunConfig(model="a", out="b", data=data)
    pairs = [(written, default), (written["data"], default.data)]
    pairs += [
        (written[name], getattr(default, name)) for name in ("training", "evaluation", "checkpoint")
    ]
    for values, section in pairs:
        assert values.keys() == type(section).model_fields.keys()
    assert written["data"]["tasks"][0].keys() == TaskConfig.model_fields.keys()
    given = {"model": found.model, "out": found.out, "data": found.data}
    assert found == default.model_copy(update=given)
    tasks = (TaskConfig(name=found.data.tasks[0].name, train=found.data.tasks[0].train),)
    assert found.data == DataConfig(tasks=tasks)


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of it, with a tiny model in the place of the one that it names."""
    monkeypatch.chdir(tmp_path)
    tutorial = DOCS / "tutorial.md"
    code = yaml_blocks(tutorial)[0]
    (tmp_path / "run.yaml").write_text(code, encoding="utf-8")
    model = tmp_path / YAML(typ="safe").load(code)["model"]
    model.parent.mkdir(parents=True)
    save_tiny_model(model)
    small = [
        "training.steps=2",
        "training.warmup_steps=1",
        "data.train_rows=20",
        "data.test_rows=10",
    ]
    commands = re.findall(r"(?m)^    sculpt (.*)$", tutorial.read_text(encoding="utf-8"))
    assert [command.split()[0] for command in commands] == ["train", "train", "report", "verify"]
    for command in commands:
        more = small if command.startswith("train") else []
        done = CliRunner().invoke(app, [*shlex.split(command), *more])
        assert done.exit_code == 0, f"{command}: {done.output} {done.exception!r}"
    assert (tmp_path / "runs/first/report.html").is_file()
    assert (tmp_path / "runs/first/model/config.json").is_file()


def links(text: str) -> list[str]:
    """Relative targets of links and pictures, those in code left out."""
    prose = re.sub(r"(?m)^    .*$|`[^`\n]*`", "", FENCED.sub("", text))
    targets = re.findall(r"\]\(([^()\s]+)\)", prose)
    return [target for target in targets if "://" not in target]


def anchors(text: str) -> set[str]:
    """Of the headings, as the forge and the site both make them."""
    headings = re.findall(r"(?m)^#+ (.*)$", FENCED.sub("", text))
    kept = (re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings)
    return {
        name.replace(" ", "-")
        for name in kept
        if name.isascii() and re.sub(r"[-\s]+", "-", name) == name.replace(" ", "-")
    }


def leads_somewhere(path: Path, link: str) -> bool:
    """Whether a link of a document has a target; the site cannot follow those out of docs/."""
    name, _, anchor = link.partition("#")
    target = (path.parent / name).resolve() if name else path
    if not target.exists() or (path.is_relative_to(DOCS) and not target.is_relative_to(DOCS)):
        return False
    return not anchor or anchor in anchors(target.read_text(encoding="utf-8", errors="ignore"))


def dead_links(path: Path, text: str) -> list[str]:
    return [link for link in links(text) if not leads_somewhere(path, link)]


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_links_lead_somewhere(path: Path) -> None:
    assert dead_links(path, path.read_text(encoding="utf-8")) == []


def test_dead_links_are_seen() -> None:
    page = DOCS / "how-to/ranks.md"
    good = "[a](../index.md) [b](#budgets) [c](trainer.md#trl) [d](https://example.com) `[e](f)`"
    assert dead_links(page, page.read_text(encoding="utf-8") + good) == []
    bad = ["gone.md", "#gone", "trainer.md#gone", "../../README.md", "../images/importance.png#a"]
    assert dead_links(page, "".join(f"[a]({link}) " for link in bad)) == bad


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    inside = re.findall(r"(?m)^ +- .*: (\S+\.md)$", text)
    assert sorted(inside) == sorted(str(path.relative_to(DOCS)) for path in DOCS.glob("**/*.md"))


@pytest.mark.parametrize("path", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=named)
def test_commands_and_files_that_are_named_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"python -m ((?:bench|sculpt|sculpt_kernels)[\w.]*)", text):
        module = ROOT / name.rstrip(".").replace(".", "/")
        assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), name
    folders = "bench|docs|examples|native|sculpt|sculpt_kernels|tests|tools"
    for name in re.findall(rf"`((?:{folders})/[\w./-]*(?:\.\w+|/))`", text):
        assert (ROOT / name).exists(), name


def locate(name: str) -> Any:
    module, _, own = name.rpartition(".")
    try:
        return getattr(import_module(module), own)
    except AttributeError:
        return import_module(name)


def test_the_reference_has_every_public_name() -> None:
    pages = (page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    names = re.findall(r"(?m)^::: (\S+)$", "\n".join(pages))
    documented = {id(locate(name)) for name in names}
    for package in (sculpt, sculpt_kernels):
        for name in set(package.__all__) - {"RunConfig"}:  # the run file has its fields
            assert id(getattr(package, name)) in documented, f"{package.__name__}.{name}"
