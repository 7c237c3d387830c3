"""Which implementations can run here, and why the others cannot."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from sculpt_kernels import checks, native

AVAILABLE = "available"
NAMES = ("triton", "native", "torch")


def backends() -> dict[str, str]:
    """Map each backend to `"available"` or to the reason why it cannot run here."""
    return {
        "triton": _triton_missing() or AVAILABLE,
        "native": native.missing() or AVAILABLE,
        "torch": AVAILABLE,
    }


def choose(
    backend: str,
    device: torch.device,
    refused: Callable[[], str | None],
    rounding: str = "nearest",
) -> str:
    """Resolve `backend` to the one that runs this call.

    `refused` tells why the Triton kernel cannot take the arguments, or `None`. `"auto"` takes
    Triton on CUDA, torch elsewhere; `"native"`, and `"auto"` where it is there, is torch with the
    stochastic `rounding` of the native library.

    Raises:
        ValueError: no such backend.
        RuntimeError: a backend was named that cannot run here.
    """
    if backend == "torch":
        return "torch"
    if backend == "auto" and device.type != "cuda":
        return "native" if rounding == "stochastic" and _native(device) is None else "torch"
    checks.one_of("backend", backend, ("auto", *NAMES))
    if backend == "native":
        reason = _native(device)
        if reason is None and rounding != "stochastic":
            reason = "it rounds stochastically and does nothing else"
    else:
        reason = _triton_missing() or _wrong_device(device) or refused()
    if reason is None:
        return backend if backend != "auto" else "triton"
    if backend == "auto":
        return "torch"
    raise RuntimeError(f"backend={backend!r} cannot run here: {reason}")


def _native(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the native kernels work on CPU tensors; these are on {device}"
    return native.missing()


def unsupported(*tensors: Tensor | None) -> str | None:
    """Why no Triton kernel can take these tensors, or `None`; only where Triton can run at all."""
    from sculpt_kernels.triton import launcher

    return launcher.unsupported(*tensors)


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=1)
def _triton_spec() -> bool:
    return find_spec("triton") is not None


def _triton_missing() -> str | None:
    if not _triton_spec():
        return "Triton is not installed; pip install 'sculpt-kernels[triton]'"
    if not torch.cuda.is_available() and not interpreted():
        return "Triton kernels need a CUDA device, or TRITON_INTERPRET=1 for tests"
    return None


def _wrong_device(device: torch.device) -> str | None:
    if device.type == "cuda" or interpreted():
        return None
    return f"Triton kernels work on CUDA tensors; these are on {device}"
