"""bitsandbytes and torchao, where they are: their optimizers train, their layers are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sculpt import SculptConfig, Sculptor
from tests.sculpt.small_models import begin


@pytest.mark.parametrize("package", ["bitsandbytes", "torchao"])
def test_8_bit_optimizers(package):
    """Where they are installed: their quantised states act on coordinates and cannot leak."""
    pytest.importorskip(package)
    if package == "bitsandbytes":
        from bitsandbytes.optim import AdamW8bit
    else:
        from torchao.optim import AdamW8bit
    # 64 x 64 coordinates: smaller ones keep 32-bit states in both.
    model = torch.nn.Sequential(torch.nn.Linear(256, 256))
    sculptor, optimizer = begin(model, SculptConfig(), AdamW8bit, lr=1e-3)
    x = torch.randn(4, 256)
    # What is compiled here is no kernel of ours.
    with torch.compiler.set_stance("force_eager"):
        for _ in range(20):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    (state,) = optimizer.state.values()
    moment = state["state1"] if package == "bitsandbytes" else state["exp_avg"].codes
    assert moment.dtype == torch.uint8
    certificate = sculptor.verify(independent=True)
    assert certificate.ok, str(certificate)
    assert all(row.change > 1e-4 for row in certificate.rows)


def test_layers_of_bitsandbytes_are_refused():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for kind in (bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Linear4bit):
        model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": kind(64, 64)})
        with pytest.raises(ValueError, match=rf"'b' is a {kind.__name__} of bitsandbytes: quantis"):
            Sculptor(model, SculptConfig())


def test_weights_of_torchao_are_refused():
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
    quantization.quantize_(model["b"], quantization.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"matches 'b', .* its weight is a \w+, not a plain param"):
        Sculptor(model, SculptConfig(target_modules=["b"]))
