"""Which implementations can run here, and why the others cannot."""

from __future__ import annotations

from sculpt_kernels import checks

AVAILABLE = "available"
NAMES = ("triton", "native", "torch")


def backends() -> dict[str, str]:
    """Map each backend to `"available"` or to the reason why it cannot run here."""
    return {
        "triton": "this version has no Triton kernels",
        "native": "this version has no native kernels",
        "torch": AVAILABLE,
    }


def require(backend: str) -> str:
    """Resolve `backend` (`"auto"` or a name) to one that runs here; raise and say why if none."""
    checks.choice("backend", backend, ("auto", *NAMES))
    if backend == "auto":
        return "torch"
    reason = backends()[backend]
    if reason != AVAILABLE:
        raise RuntimeError(f"backend={backend!r} cannot run here: {reason}")
    return backend
