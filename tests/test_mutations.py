"""The list of changes that the tests must notice: it fits the code, and the table shows it."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutations", ROOT / "tools" / "mutations.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutations"] = module
    spec.loader.exec_module(module)
    return module


mutations = load()
CASES = pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda m: m.name)


@CASES
def test_every_change_applies_and_names_a_test(mutation) -> None:
    text = (ROOT / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.before) == 1
    after = mutations.changed(text, mutation)
    if mutation.file.endswith(".py"):
        ast.parse(after)
    path, test = mutation.test.split("::")
    assert re.search(rf"^def {test}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize(
    ("passes", "verdict", "code"),
    [
        ((True, False), "caught", 0),
        ((True, True), "MISSED", 1),
        ((False, False), "the test fails without the change", 1),
    ],
)
def test_the_verdict(passes, verdict, code, tmp_path, monkeypatch, capsys) -> None:
    """`passes`: whether the test passes without and with the change."""
    (tmp_path / "code.py").write_text("right\n")
    change = mutations.Mutation("one", "code.py", "right", "wrong", "test_it")
    monkeypatch.setattr(mutations, "MUTATIONS", [change])
    monkeypatch.setattr(mutations, "copied", lambda: nullcontext(tmp_path))

    def run(tree, test):
        return passes["wrong" in (tree / "code.py").read_text()]

    monkeypatch.setattr(mutations, "run", run)
    assert mutations.main([]) == code
    assert capsys.readouterr().out.startswith(verdict)
    assert (tmp_path / "code.py").read_text() == "right\n"


def test_what_is_not_there_cannot_be_changed() -> None:
    change = mutations.Mutation("one", "code.py", "right", "wrong", "test_it")
    with pytest.raises(ValueError, match=r"code\.py must contain 'right' \(one\)"):
        mutations.changed("left", change)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="it starts the interpreter")
def test_every_change_is_noticed() -> None:
    pytest.importorskip("triton")
    assert mutations.main([]) == 0
