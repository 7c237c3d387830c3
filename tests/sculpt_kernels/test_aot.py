"""Kernels compiled ahead of time, launched from Python by a driver that only remembers."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import triton

from sculpt_kernels.aot import __main__ as command
from sculpt_kernels.aot import pack
from sculpt_kernels.aot.build import Choice, build
from sculpt_kernels.kernels import host, project, update

BF16 = torch.bfloat16
ONLY = ["project_left_", "update_stochastic_"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("aot") / "pack"
    assert build(Choice([90], [(128, 64)], [16], ["bfloat16"], ONLY), made) == 4
    return made


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Whatever SCULPT_AOT says is read anew, before and after."""
    pack.active.cache_clear()
    yield monkeypatch
    pack.active.cache_clear()


class FakeDriver:
    """A device of compute capability 9.0 that remembers launches."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, int, tuple[Any, ...]]] = []
        self.utils = SimpleNamespace(
            load_binary=lambda name, cubin, shared, device: (1, (name, cubin), 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
            unload_module=lambda module: None,
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_stream(self, device: int) -> int:
        return 7

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
            name, cubin = function
            assert (y, z, stream) == (1, 1, 7)
            assert cubin[:4] == b"\x7fELF"
            self.launches.append((name, x, rest[4:]))  # behind metadata and hooks

        return launch


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    from triton.runtime.driver import driver as active

    before = active._active
    fake = FakeDriver()
    active.set_active(fake)
    yield fake
    pack.active.cache_clear()
    gc.collect()  # kernels are unloaded by the driver that loaded them
    active._active = before


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.zeros(256, 512, dtype=BF16), torch.zeros(256, 32, dtype=BF16), torch.zeros(
        512, 32, dtype=BF16
    )  # fmt: skip


def test_launches_are_answered_from_the_pack(
    folder: Path, opened: pytest.MonkeyPatch, driver: FakeDriver
) -> None:
    """Other shapes with the same divisibility, numbers and device scalars, and no compilation."""
    opened.setenv("SCULPT_AOT", str(folder))

    def compiles(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing may be compiled")

    opened.setattr(triton.compiler.compiler, "compile", compiles)
    opened.setattr(triton.runtime.jit.JITFunction, "run", compiles)
    X, A, B = operands()
    for alpha, seed in ((0.5, 1), (2.0, 2**40), (torch.tensor(1.0), torch.tensor(3))):
        update.update_(X, A, B, alpha=alpha, rounding="stochastic", seed=seed)
    assert len(pack.active()._loaded) == 2  # one for all numbers, one for tensors
    # Only tensors on the device of the matrix are left there, so these are passed on as they are.
    names, programs, values = zip(*driver.launches, strict=True)
    assert set(names) == {"update_kernel"}
    assert set(programs) == {2 * 4}
    parameters = [p.name for p in update.update_kernel.params]
    for given, seed in zip(values, (1, 2**40, 3), strict=True):
        arguments = dict(zip(parameters, given, strict=True))
        assert (arguments["m"], arguments["n"], arguments["k"]) == (256, 512, 32)
        assert int(arguments["seed"]) == seed
        assert arguments["X"].data_ptr() == X.data_ptr()
    driver.launches.clear()
    project.project_(X[:, :64].contiguous(), A[:, :16].contiguous(), None, "left")
    assert [name for name, _, _ in driver.launches] == ["reduce_kernel", "apply_kernel"]


def test_what_the_pack_lacks_is_an_error(
    folder: Path, opened: pytest.MonkeyPatch, driver: FakeDriver
) -> None:
    opened.setenv("SCULPT_AOT", str(folder))
    X, A, B = operands()
    with pytest.raises(RuntimeError, match=r"lacks a kernel.*--rank and --dtype: update_kernel\("):
        update.update_(X, A[:, :5], B[:, :5], rounding="stochastic", seed=1)
    with pytest.raises(RuntimeError, match="lacks a kernel"):
        update.update_(X.float(), A, B)
    opened.setattr(host, "target_capability", (8, 0))
    with pytest.raises(RuntimeError, match=r"has kernels for sm_90; this device is sm_80.*--arch"):
        update.update_(X, A, B, rounding="stochastic", seed=1)
    assert driver.launches == []


@pytest.mark.parametrize("what", ["triton", "kernel sources", "format"])
def test_a_pack_made_with_something_else(
    what: str, folder: Path, opened: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    manifest = json.loads((folder / pack.MANIFEST).read_text())
    (tmp_path / pack.MANIFEST).write_text(json.dumps(manifest | {what: "other"}))
    opened.setenv("SCULPT_AOT", str(tmp_path))
    X, A, B = operands()
    with pytest.raises(RuntimeError, match=rf"compiled with {what} other; this.*has {what} "):
        update.update_(X, A, B)


def test_a_pack_that_is_not_whole(
    folder: Path, opened: pytest.MonkeyPatch, driver: FakeDriver, tmp_path: Path
) -> None:
    (tmp_path / pack.MANIFEST).write_text((folder / pack.MANIFEST).read_text())
    opened.setenv("SCULPT_AOT", str(tmp_path))
    X, A, B = operands()
    with pytest.raises(
        RuntimeError, match=r"lacks update_kernel_\w+\.json and update_kernel_\w+\.cub"
    ):
        update.update_(X, A, B, rounding="stochastic", seed=1)
    assert driver.launches == []


def test_a_folder_that_is_no_pack(opened: pytest.MonkeyPatch, tmp_path: Path) -> None:
    X, A, B = operands()
    for text in (None, "{", "[]", "{}"):
        if text is not None:
            (tmp_path / pack.MANIFEST).write_text(text)
        opened.setenv("SCULPT_AOT", str(tmp_path))
        pack.active.cache_clear()
        with pytest.raises(RuntimeError, match=r"SCULPT_AOT must name a folder that `python -m"):
            update.update_(X, A, B)


def test_kernel_sources_decide_what_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    kernel = tmp_path / "kernels" / "one.py"
    monkeypatch.setattr(pack, "__file__", str(tmp_path / "aot" / "pack.py"))
    digests = set()
    for text in ("a", "b"):
        kernel.write_text(text)
        pack.origin.cache_clear()
        digests.add(pack.origin()["kernel sources"])
    pack.origin.cache_clear()
    assert len(digests) == 2


def test_the_pack_holds_nothing_of_the_machine(folder: Path) -> None:
    for path in folder.rglob("*.json"):
        assert str(Path(triton.__file__).parent) not in path.read_text()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--arch", "90", "--matrix", "128x64", "--rank", "16", "--out", str(tmp_path / "p")]
    assert command.main([*arguments, "--only", "update_stochastic_128"]) == 0
    assert "1 kernels in" in capsys.readouterr().out
    # An older pack is replaced, and nothing else.
    assert command.main([*arguments, "--only", "update_stochastic_128"]) == 0
    (tmp_path / "mine.txt").write_text("")
    for wrong, message in (
        (["--only", "nothing"], "nothing was chosen"),
        (["--rank", "100"], "nothing was chosen"),
        (["--matrix", "12"], "must be rows x columns"),
        (["--dtype", "int8"], "invalid choice"),
        (["--out", str(tmp_path)], "must name a new folder or an older pack"),
    ):
        with pytest.raises(SystemExit):
            command.main([*arguments, *wrong])
        assert message in capsys.readouterr().err
    assert (tmp_path / "mine.txt").exists()
