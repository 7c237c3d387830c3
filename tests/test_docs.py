"""Runs the Python examples of README.md and docs/*.md, so that they cannot go stale.

The ```python blocks of a file run from top to bottom in one namespace, in an empty folder. A block
that cannot run here says so in its fence: ```python no-run; one that needs a package is skipped
without it: ```python needs-peft
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("README.md"), *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^(?P<indent>\s*)(?P<ticks>`{3,})(?P<info>[^`]*)$")


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
    found: list[Block] = []
    opened: re.Match[str] | None = None
    start, code = 0, list[str]()
    for number, line in enumerate(text.splitlines(), 1):
        fence = FENCE.match(line)
        if opened is None:
            if fence:
                opened, start, code = fence, number + 1, []
        elif fence and not fence["info"].strip() and len(fence["ticks"]) >= len(opened["ticks"]):
            inside = textwrap.dedent("\n".join(code)) + "\n"
            found.append(Block(opened["info"].strip(), start, inside))
            opened = None
        else:
            code.append(line)
    if opened is not None:
        raise ValueError(f"the block that starts at line {start - 1} is never closed")
    return found


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
  if numbers:
      total = sum(numbers)
  ```

```python no-run
train_for_a_week()
```

```console
$ sculpt demo
```

````markdown
```python
not_an_example()
```
````

```py
assert total == 6
```
"""


def test_blocks_share_a_namespace_and_marked_ones_are_left_out() -> None:
    assert [block.runs for block in blocks(SAMPLE)] == [True, True, False, False, False, True]
    assert execute(SAMPLE, "sample.md") == 3


def test_a_failing_example_points_at_its_line() -> None:
    with pytest.raises(AssertionError) as failure:
        execute(SAMPLE.replace("== 6", "== 7"), "sample.md")
    where = failure.traceback[-1]
    assert str(where.path).endswith("sample.md")
    assert SAMPLE.splitlines()[where.lineno].startswith("assert total")


def test_an_open_block_is_an_error() -> None:
    with pytest.raises(ValueError, match="line 3 is never closed"):
        blocks("a\n\n```python\nx = 1\n")
