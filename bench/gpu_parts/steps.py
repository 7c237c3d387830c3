"""A small training task of the compact engine, the same whenever it is made."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from sculpt import SculptConfig, Sculptor
from sculpt_kernels import Subspace

RATIO = 0.25


class Training:
    """A model in a task, its optimizer and its batch; two of them take the same steps.

    Attributes:
        model: layers of several shapes, so that weights follow in several launches.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        layers: list[nn.Module] = []
        given = {}
        for n, m in ((256, 512), (512, 512), (512, 512), (512, 128)):
            layer = nn.Linear(n, m)
            nn.init.normal_(layer.weight, std=n**-0.5, generator=generator)
            nn.init.zeros_(layer.bias)
            t = int(RATIO * min(m, n))
            U, V = (torch.randn(size, t, generator=generator) for size in (m, n))
            U, V = (torch.linalg.qr(B).Q.to(device) for B in (U, V))
            given[str(len(layers))] = Subspace(U, V, min(m, n) - t, "low", 1.0, "random")
            layers += [layer, nn.SiLU()]
        self.model = nn.Sequential(*layers).to(device, dtype)
        self.x = torch.empty(64, 256, device=device, dtype=dtype)
        self.load(0)
        self.sculptor = Sculptor(self.model, SculptConfig(unfreeze_rank_ratio=RATIO))
        self.sculptor.begin_task(subspaces=given)
        # On a CPU there is nothing to capture, and torch refuses to promise it.
        self.optimizer = torch.optim.AdamW(
            self.sculptor.parameters(), lr=1e-3, fused=True, capturable=device.type == "cuda"
        )
        self.sculptor.attach(self.optimizer)
        self._start = self.state()

    def load(self, batch: int, scale: float = 1.0) -> None:
        """Put a batch where the step finds it."""
        generator = torch.Generator().manual_seed(batch)
        self.x.copy_(scale * torch.randn(self.x.shape, generator=generator))

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = (self.model(self.x) - 1).float().square().mean()
        loss.backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a step was left out, which is wanted here
            self.optimizer.step()

    def state(self) -> list[Tensor]:
        """Copies of the weights, the coordinates, and what the optimizer keeps of them."""
        trained = self.sculptor.parameters()
        held = [value for p in trained for value in self.optimizer.state[p].values()]
        return [t.detach().clone() for t in (*self.model.parameters(), *held)]

    @property
    def moved(self) -> bool:
        """Whether the weights have changed since the beginning."""
        return not torch.equal(self._start[0], self.state()[0])
