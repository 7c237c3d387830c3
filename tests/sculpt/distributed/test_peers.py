"""What happens to PEFT's OSF when its factors are divided: its gradients are not projected."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from launch import launch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

peft = pytest.importorskip("peft")


def osf_leak(divided: bool) -> float:
    """`‖U_highᵀ ΔU_low‖ / ‖ΔU_low‖` of one step of plain SGD, worst of two layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24))
    model = peft.get_peft_model(model, peft.OSFConfig(effective_rank=12, target_modules=["0", "2"]))
    # For a square layer what is protected is all outside of the factor at the start.
    before = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if name.endswith("U_low")
    }
    wrapped = fully_shard(model) if divided else DistributedDataParallel(model)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=10.0)
    x = torch.randn(8, 24, generator=torch.Generator().manual_seed(dist.get_rank()))
    wrapped(x).square().mean().backward()
    optimizer.step()
    leaks = []
    after = dict(model.named_parameters())
    for name, low in before.items():
        factor = after[name].full_tensor() if divided else after[name]
        delta = factor.detach() - low
        leaks.append(float((delta - low @ (low.mT @ delta)).norm() / delta.norm()))
    return max(leaks)


def test_osf_leaves_its_subspace_under_fully_shard(tmp_path):
    (tmp_path / "whole").mkdir()
    for whole in launch(2, osf_leak, tmp_path / "whole", False):
        assert whole < 1e-5
    for divided in launch(2, osf_leak, tmp_path, True):
        assert divided > 0.1
