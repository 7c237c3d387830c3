"""`sculpt doctor`: what runs here, and whether it computes what the reference says."""

from __future__ import annotations

import importlib.util
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import sculpt_kernels as kernels
from sculpt.cli.common import FINE, NEGATIVE, orderly_exit, print_json
from sculpt.installation import DISTRIBUTION, other_distribution
from sculpt_kernels import reference

NEEDED = (DISTRIBUTION, "torch", "transformers", "safetensors", "numpy", "typer", "rich")
OPTIONAL = {
    "triton": "GPU kernels",
    "accelerate": "transformers.Trainer",
    "trl": "SFTTrainer",
    "datasets": "data sets of the Hugging Face hub",
    "matplotlib": "sculpt report, sculpt demo",
    "lm_eval": "general ability before and after",
    "tensorboard": "logging",
    "wandb": "logging",
    "mlflow": "logging",
}
# The arithmetic of a fast path may round differently from plain torch, not worse by more than this.
WORSE = 4.0
SHAPE, RANK, TOKENS = (160, 224), 40, 96


Tensors = dict[str, Tensor]
Operation = Callable[[str, Tensors], Tensor]
"""By a backend, or by the reference."""


@dataclass(frozen=True)
class Check:
    """One operation on one backend: its relative error in float32 against float64.

    `plain` is the error of the reference itself in float32. `skipped` says why the backend does not
    take the operation; `failure` what it raised.
    """

    operation: str
    backend: str
    device: str
    error: float | None = None
    plain: float | None = None
    milliseconds: float | None = None
    skipped: str = ""
    failure: str = ""

    @property
    def ok(self) -> bool:
        if self.skipped:
            return True
        if self.failure or self.error is None or self.plain is None:
            return False
        # A NaN fails the comparison.
        return self.error <= WORSE * max(self.plain, torch.finfo(torch.float32).eps)


@dataclass(frozen=True)
class Diagnosis:
    """packages, machine: name and what was found; backends: as `sculpt_kernels.backends()`.

    conflict: what is installed that replaces files of this project, or None.
    """

    packages: dict[str, str]
    machine: dict[str, str]
    backends: dict[str, str]
    checks: list[Check]
    conflict: str | None = None

    @property
    def ok(self) -> bool:
        return self.conflict is None and all(check.ok for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        checks = [{**asdict(check), "ok": check.ok} for check in self.checks]
        return {**asdict(self), "checks": checks, "ok": self.ok}


def diagnose() -> Diagnosis:
    """Look around, and test every backend that is available against the reference."""
    backends = kernels.backends()
    checks: list[Check] = []
    for backend, device in _places(backends):
        checks += [_check(name, run, backend, device) for name, run in OPERATIONS.items()]
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        checks += [_check(name, run, "auto", device) for name, run in CHOOSING.items()]
    return Diagnosis(_packages(), _machine(), backends, checks, other_distribution())


def _packages() -> dict[str, str]:
    found = {}
    for name in (*NEEDED, *OPTIONAL):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            there = importlib.util.find_spec(name.replace("-", "_")) is not None
            found[name] = "there" if there else f"not installed ({OPTIONAL.get(name, 'needed')})"
    return found


def _machine() -> dict[str, str]:
    found = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": f"{os.cpu_count()}, {torch.get_num_threads()} threads in torch",
        "cuda in torch": torch.version.cuda or "no, this is a CPU build",
    }
    if not torch.cuda.is_available():
        return found | {"gpu": "none that torch can use"}
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        found[f"gpu {index}"] = f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}"
    return found


def _places(backends: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Every backend that is available, on every device it works on."""
    cuda = torch.cuda.is_available()
    for backend, state in backends.items():
        if state != "available":
            continue
        if backend != "triton" or not cuda:  # Triton without a GPU is its interpreter
            yield backend, "cpu"
        if backend != "native" and cuda:
            yield backend, "cuda"


def _check(name: str, run: Operation, backend: str, device: str) -> Check:
    inputs = _inputs()
    exact = run("reference", {key: value.double() for key, value in inputs.items()})
    plain = run("reference", inputs)
    there = {key: value.to(device) for key, value in inputs.items()}
    try:
        run(backend, {key: value.clone() for key, value in there.items()})  # what is compiled once
        start = time.perf_counter()
        result = run(backend, there).cpu()
        seconds = time.perf_counter() - start
    except RuntimeError as error:
        if "cannot run here" in str(error):
            return Check(name, backend, device, skipped=str(error).partition(": ")[2])
        return Check(name, backend, device, failure=str(error))
    except Exception as error:  # a broken installation may raise anything
        return Check(name, backend, device, failure=f"{type(error).__name__}: {error}")
    errors = _distance(result, exact), _distance(plain, exact)
    return Check(name, backend, device, *errors, 1000 * seconds)


def _distance(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


def _inputs() -> Tensors:
    g = torch.Generator().manual_seed(0)
    m, n = SHAPE
    return {
        "W": torch.randn(m, n, generator=g),
        "G": torch.randn(m, n, generator=g),
        "U": torch.linalg.qr(torch.randn(m, RANK, generator=g)).Q,
        "V": torch.linalg.qr(torch.randn(n, RANK, generator=g)).Q,
        "C": torch.randn(RANK, RANK, generator=g),
        "x": torch.randn(TOKENS, n, generator=g),
        "dy": torch.randn(TOKENS, m, generator=g),
    }


def _by(backend: str, name: str, *arguments: Any, **options: Any) -> Any:
    """What the kernels compute by a backend, or the reference."""
    if backend == "reference":
        return getattr(reference, name.rstrip("_"))(*arguments, **options)
    return getattr(kernels, name)(*arguments, **options, backend=backend)


def _project(form: str) -> Operation:
    def run(backend: str, t: Tensors) -> Tensor:
        U = None if form == "right" else t["U"]
        V = None if form == "left" else t["V"]
        projected: Tensor = _by(backend, "project", t["G"], U, V, form=form)
        return projected

    return run


def _adamw(backend: str, t: Tensors) -> Tensor:
    W, G, U, V = (t[name] for name in "WGUV")
    moments, how = (torch.zeros_like(W), torch.zeros_like(W)), {"form": "strict", "lr": 0.1}
    stepped = _by(backend, "project_adamw_", W, G, *moments, U, V, **how, step=1)
    after: Tensor = stepped[0] if backend == "reference" else stepped
    return after


def _layer(backend: str, t: Tensors) -> Tensor:
    """`dC`, which a layer during a task learns from."""
    if backend == "reference":
        return reference.linear_gradients(t["x"], t["W"], t["dy"], t["U"], t["V"])[2]
    C = torch.zeros_like(t["C"]).requires_grad_()
    y = kernels.compact_linear(t["x"], t["W"], None, t["U"], t["V"], C)
    return torch.autograd.grad(y, C, t["dy"])[0]


def _split(backend: str, t: Tensors) -> Tensor:
    """The matrix within its leading singular subspace, whose spectrum falls off behind the cut."""
    A = t["U"] @ t["C"] @ t["V"].mT + 1e-2 * t["W"]
    if backend == "reference":
        U = reference.split(A, RANK, "high")[0]
    else:
        # As the training layer asks for it: in float64, so that the span is exact.
        U = kernels.split(A.double(), rank=RANK, part="high").U.to(A.dtype)
    return U @ (U.mT @ A)


OPERATIONS: dict[str, Operation] = {
    **{f"project, {form}": _project(form) for form in ("core", "strict", "left", "right")},
    "compress": lambda backend, t: _by(backend, "compress", t["G"], t["U"], t["V"]),
    "expand_add_": lambda backend, t: _by(backend, "expand_add_", *(t[name] for name in "WCUV")),
    "project_adamw_": _adamw,
}
# These choose their backend themselves.
CHOOSING: dict[str, Operation] = {"compact_linear": _layer, "split": _split}


@orderly_exit()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """What runs here: packages, GPU, backends, and a self-test of each against the reference.

    A negative verdict: something that is available does not compute what it should, or another
    distribution replaces files of this one.
    """
    from rich import box
    from rich.table import Table

    from sculpt.cli.console import new_console

    found = diagnose()
    if as_json:
        print_json(found.to_dict())
        raise typer.Exit(FINE if found.ok else NEGATIVE)
    console = new_console()
    for title, values in (
        ("Machine", found.machine),
        ("Packages", found.packages),
        ("Backends", found.backends),
    ):
        table = Table(
            title=title, title_justify="left", box=None, show_header=False, pad_edge=False
        )
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for name, value in values.items():
            table.add_row(name, value)
        console.print(table, "")
    table = Table(
        title="Self-test, float32 against float64", title_justify="left", box=box.SIMPLE_HEAD
    )
    for column in ("operation", "backend", "device", "error", "plain torch", "ms", "result"):
        table.add_column(
            column, justify="right" if column in ("error", "plain torch", "ms") else "left"
        )
    for check in found.checks:
        numbers = ("", "", "")
        if check.error is not None:
            numbers = (f"{check.error:.1e}", f"{check.plain:.1e}", f"{check.milliseconds:.1f}")
        result = check.failure or (f"not there: {check.skipped}" if check.skipped else "")
        result = result or ("ok" if check.ok else "WRONG")
        style = "" if check.ok else "red"
        table.add_row(check.operation, check.backend, check.device, *numbers, result, style=style)
    console.print(table)
    wrong = [check for check in found.checks if not check.ok]
    if wrong:
        console.print(f"{len(wrong)} of {len(found.checks)} self-tests failed.", style="red")
    if found.conflict is not None:
        console.print(found.conflict, style="red")
    if not found.ok:
        raise typer.Exit(NEGATIVE)
    console.print("Everything that is available here computes what it should.", style="bold")
