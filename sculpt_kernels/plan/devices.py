"""Sustained rates of the devices that the cost model knows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sculpt_kernels import checks

# Dense tensor-core GEMMs on random data hold about 0.8 of the data sheet's peak (power limit);
# copies hold about 0.9 of the data sheet's bandwidth.
_GEMM = 0.8
_COPY = 0.9


@dataclass(frozen=True)
class Device:
    """Rates of one device: `bandwidth` in B/s, `rates` in FLOP/s by dtype name."""

    name: str
    bandwidth: float
    rates: dict[str, float]
    is_gpu: bool = True

    def flops(self, dtype: torch.dtype) -> float:
        return self.rates[checks.dtype_name(dtype)]


def _gpu(name: str, bandwidth: float, half: float, single: float, double: float) -> Device:
    rates = {"bfloat16": half, "float16": half, "float32": single, "float64": double}
    return Device(name, _COPY * bandwidth, {key: _GEMM * rate for key, rate in rates.items()})


# Data sheets of NVIDIA: dense bfloat16, float32 without TF32, float64 by tensor cores.
DEVICES = {
    "H100": _gpu("H100", 3.35e12, 989e12, 67e12, 67e12),
    "H200": _gpu("H200", 4.8e12, 989e12, 67e12, 67e12),
    "A100": _gpu("A100", 2.04e12, 312e12, 19.5e12, 19.5e12),
    # One core of a server CPU; low precision is computed in float32.
    "cpu": Device(
        "cpu",
        2e10,
        {"bfloat16": 8e10, "float16": 8e10, "float32": 8e10, "float64": 4e10},
        is_gpu=False,
    ),
}


def device_model(device: str | torch.device | None) -> Device:
    """The table entry for a name, a torch device, or (for `None`) the device of this machine.

    A CUDA device that the table does not know is modelled as an H100: crossovers depend on the
    ratio of arithmetic to bandwidth, which differs little between recent devices.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device, str):
        for name, model in DEVICES.items():
            if device.lower() == name.lower():
                return model
        try:
            device = torch.device(device)
        except RuntimeError:
            names = ", ".join(DEVICES)
            raise ValueError(
                f"device must be one of {names} or a torch device; got {device!r}"
            ) from None
    if device.type != "cuda":
        return DEVICES["cpu"]
    if torch.cuda.is_available():
        actual = torch.cuda.get_device_name(device)
        for name, model in DEVICES.items():
            if name in actual:
                return model
    return DEVICES["H100"]
