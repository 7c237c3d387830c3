"""The rules of the house, as far as a machine can check them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("sculpt_kernels", "sculpt")
MAX_LINES = 400


def files() -> list[Path]:
    """Every file that is tracked, or would be with the next `git add`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in listed.stdout.split("\0") if name)
    return [path for path in paths if path.is_file()]


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(source: str) -> Iterator[str]:
    """Full name of all that `source` imports, wherever and however it does so."""
    for node in ast.walk(ast.parse(source)):
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


@pytest.mark.parametrize(
    "source",
    [
        "import sculpt",
        "import torch, sculpt.metrics as m",
        "def f():\n    from sculpt import metrics",
        "from sculpt.metrics import summary",
        "import importlib\nimportlib.import_module('sculpt.run')",
        "__import__('sculpt')",
    ],
)
def test_the_scan_sees_every_way_to_import(source: str) -> None:
    assert any(of("sculpt", name) for name in imports(source))
    assert not any(of("sculpt", name) for name in imports(source.replace("sculpt", "sculpt_x")))


def test_kernels_know_nothing_of_models_or_training() -> None:
    above = ("sculpt", "transformers", "peft", "trl", "accelerate", "datasets")
    for path in modules("sculpt_kernels"):
        for name in imports(path.read_text(encoding="utf-8")):
            assert not any(of(package, name) for package in above), f"{path.name} imports {name}"


def test_training_layer_uses_the_public_names_of_the_kernels() -> None:
    import sculpt_kernels

    for path in modules("sculpt"):
        for name in imports(path.read_text(encoding="utf-8")):
            if of("sculpt_kernels", name) and name != "sculpt_kernels":
                first, *inner = name.split(".")[1:]
                assert first in sculpt_kernels.__all__, f"{path.name} imports {name}: not public"
                assert not inner or first == "reference", f"{path.name} imports {name}: go by name"


def load_time_imports(path: Path) -> Iterator[str]:
    """What the module at `path` imports while it is itself imported, without type checking."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    yield from imports("\n".join(ast.unparse(node) for node in body if not is_late(node)))


def is_late(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
        isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    )


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """Names along one circle of `graph`, or nothing."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for following in sorted(graph.get(name, ())):
            if circle := walk(following, [*way, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in sorted(graph) if (circle := walk(name, []))), [])


def test_imports_go_one_way() -> None:
    paths = {module_name(path): path for package in PACKAGES for path in modules(package)}
    graph = {}
    for name, path in paths.items():
        # `from sculpt.run import run` means the module; `from sculpt import metrics`, too.
        wanted = {w if w in paths else w.rpartition(".")[0] for w in load_time_imports(path)}
        graph[name] = (wanted & paths.keys()) - {name}
    assert find_circle(graph) == []
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


WATCHED_IMPORT = """
import sys
import torch
events = []
seen = set(sys.modules)

def watch(event, arguments):
    processes = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn")
    writes = event == "open" and any(c in str(arguments[1]) for c in "wax+")
    if event in processes or event.startswith("socket.") or writes:
        events.append(f"{event} {arguments}")

def refuse(*_, **__):
    raise AssertionError("the import asked for a device")

sys.addaudithook(watch)
for name in ("_lazy_init", "is_available", "device_count", "init", "current_device"):
    setattr(torch.cuda, name, refuse)
import sculpt
import sculpt_kernels
heavy = {name.partition(".")[0] for name in set(sys.modules) - seen}
print(sorted(heavy & {"transformers", "matplotlib", "triton", "accelerate", "gguf", "rich"}))
print(sorted(n for n in set(sys.modules) - seen if n.startswith("torch._inductor")))
print(events)
"""


def test_importing_opens_no_device_compiles_nothing_and_stays_light() -> None:
    # -B: compiled bytecode is not what is meant by writing files.
    command = [sys.executable, "-B", "-W", "error", "-c", WATCHED_IMPORT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    heavy, compiler, events = done.stdout.splitlines()
    assert heavy == "[]"
    assert compiler == "[]"
    assert events == "[]"


# Written in pieces, so that this file is clean itself.
HOSTS = [
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("registry", "npmjs", "org"),
        ("deb", "debian", "org"),
        ("download", "pytorch", "org"),
        ("conda", "anaconda", "org"),
        ("crates", "io"),
    )
]
FORBIDDEN = {
    "a package registry's host": re.compile("|".join(re.escape(host) for host in HOSTS)),
    "a path of somebody's machine": re.compile(
        r"(?<![\w.~-])/(?:" + "|".join(["root", "work", r"home/\w+", r"Users/\w+"]) + r")/"
    ),
}


def offences(text: str) -> list[str]:
    return [
        f"{what}: {found[0]!r}"
        for what, pattern in FORBIDDEN.items()
        if (found := pattern.search(text))
    ]


def test_no_file_names_a_machine_or_a_registry() -> None:
    slash = "/"
    assert offences(f"cd {slash}root{slash}project")
    assert offences(f'"{slash}home{slash}somebody{slash}data"')
    assert offences(f"index = https:{slash}{slash}{HOSTS[0]}{slash}simple")
    assert not offences("https://example.com/root/page and docs/home/page and ~/work/x")
    for path in files():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        assert not offences(text), f"{path.relative_to(ROOT)} names {offences(text)}"


def test_a_file_fits_on_a_few_screens() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in files()
        if path.suffix == ".py"
        and (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert long == {}, f"longer than {MAX_LINES} lines; give each idea a file of its own"
