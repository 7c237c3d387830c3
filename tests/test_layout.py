"""The rules of the repository that a machine can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES_AT_THE_ROOT = {"sculpt": 12, "sculpt_kernels": 14}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in MODULES_AT_THE_ROOT
    for path in sorted((ROOT / package).rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
# Words that name nothing in this field.
INVENTED = {"room", "standing", "stray", "strips", "deaf"}


def imports(tree: ast.AST) -> Iterator[str]:
    """Full name of all that `tree` imports, wherever and however it does so."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def of(package: str, name: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("package", MODULES_AT_THE_ROOT)
def test_the_root_of_a_package_is_short(package: str) -> None:
    found = sorted(path.name for path in (ROOT / package).glob("*.py"))
    assert len(found) <= MODULES_AT_THE_ROOT[package], f"{found}: move some into folders"


def test_modules_say_in_their_first_line_what_they_are() -> None:
    for name, tree in TREES.items():
        first = (ast.get_docstring(tree) or "").partition("\n")[0]
        assert re.fullmatch(r"[A-Z`].*\.", first), f"{name} begins with {first!r}: no sentence"
        assert len(first.split()) >= 4, f"{name} begins with {first!r}: says too little"
        words = set(re.findall(r"[a-z]+", f"{name} {first}".lower()))
        assert not words & INVENTED, f"{name} begins with {first!r}: use the field's words"


def test_the_scan_sees_every_way_to_import() -> None:
    source = (
        "import a.b\nimport sys, c as d\ndef f():\n    from e import g\n"
        "importlib.import_module('h.i')\nimport_module('j')\n__import__('k')"
    )
    assert {*imports(ast.parse(source))} == {"a.b", "sys", "c", "e.g", "h.i", "j", "k"}


def test_kernels_know_nothing_of_models_or_training() -> None:
    above = ("sculpt", "transformers", "peft", "trl", "accelerate", "datasets")
    for name, tree in TREES.items():
        if of("sculpt_kernels", name):
            wrong = [w for w in imports(tree) if any(of(package, w) for package in above)]
            assert not wrong, f"{name} imports {wrong}"


def test_training_layer_uses_the_public_names_of_the_kernels() -> None:
    import sculpt_kernels

    for name, tree in TREES.items():
        for wanted in imports(tree):
            if of("sculpt", name) and wanted.startswith("sculpt_kernels."):
                first, *inner = wanted.split(".")[1:]
                assert first in sculpt_kernels.__all__, f"{name} imports {wanted}: not public"
                assert not inner or first == "reference", f"{name} imports {wanted}: go by name"


def at_import(tree: ast.Module) -> ast.Module:
    """What of a module runs while it is imported, without what only type checkers see."""
    late = (ast.FunctionDef, ast.AsyncFunctionDef)
    return ast.Module(
        [
            node
            for node in tree.body
            if not isinstance(node, late)
            and not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        ],
        [],
    )


def test_imports_go_one_way() -> None:
    graph = {}
    for name, tree in TREES.items():
        # `from sculpt.task import table` means a module, `from sculpt.task.table import Table` too.
        wanted = {w if w in MODULES else w.rpartition(".")[0] for w in imports(at_import(tree))}
        graph[name] = (wanted & MODULES.keys()) - {name}
    assert "sculpt_kernels.checks" in graph["sculpt_kernels.projection.project"]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


WATCHED_IMPORT = """
import sys
import torch
seen = set(sys.modules)

def watch(event, arguments):
    processes = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn")
    writes = event == "open" and any(c in str(arguments[1]) for c in "wax+")
    if event in processes or event.startswith("socket.") or writes:
        print(event, arguments)

def refuse(*_, **__):
    raise AssertionError("the import asked for a device")

sys.addaudithook(watch)
for name in ("_lazy_init", "is_available", "device_count", "init", "current_device"):
    setattr(torch.cuda, name, refuse)
import sculpt
import sculpt_kernels
heavy = ("transformers", "matplotlib", "triton", "accelerate", "gguf", "rich", "torch._inductor")
for name in set(sys.modules) - seen:
    if name.startswith(heavy):
        print(name)
"""


def test_importing_opens_no_device_compiles_nothing_and_stays_light() -> None:
    # -B: compiled bytecode is not what is meant by writing files.
    command = [sys.executable, "-B", "-W", "error", "-c", WATCHED_IMPORT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


FORBIDDEN = re.compile(
    r"pypi[.]org|pythonhosted[.]org|registry[.]npmjs[.]org|deb[.]debian[.]org"
    r"|download[.]pytorch[.]org|conda[.]anaconda[.]org|crates[.]io"
    r"|(?<![\w.~-])/(?:root|work|home/\w+|Users/\w+)/"
)


def test_no_file_names_a_machine_or_a_registry() -> None:
    for wrong in ("cd /-root/project", '"/-home/somebody/data"', "https://pypi-.org/simple"):
        assert FORBIDDEN.search(wrong.replace("-", "")), wrong
    assert not FORBIDDEN.search("https://example.com/root/page and docs/home/page and ~/work/x")
    # Tracked files, and those that the next `git add` would track.
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and (found := FORBIDDEN.search(path.read_text("utf-8", "ignore"))):
            pytest.fail(f"{name} names {found[0]!r}")
