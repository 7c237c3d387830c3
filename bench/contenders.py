"""One model, trained in four ways: plain, sculpt, PEFT's OSF, PEFT's LoRA.

All train the same matrices with `AdamW(fused=True)` and freeze the rest.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bench.llama import Llama
from bench.timing import clock
from sculpt import SculptConfig, Sculptor
from sculpt.memory import optimizer_state_bytes
from sculpt_kernels import Subspace, leak

RATIOS = {"1/2": 0.5, "1/4": 0.25, "1/8": 0.125}
LORA_RANK = 32


@dataclass(frozen=True)
class Decomposition:
    """One matrix before training and its thin singular vectors, found once for all contenders."""

    W: Tensor
    U: Tensor
    S: Tensor
    V: Tensor

    def low(self, h: int) -> Subspace:
        U, V = self.U[:, h:].contiguous(), self.V[:, h:].contiguous()
        return Subspace(U, V, h, "low", 1.0, "given")


def decompose(model: Llama) -> dict[str, Decomposition]:
    """By eigenvectors of the smaller Gram matrix in float64, rounded once."""
    found = {}
    for name, module in model.matrices().items():
        W = module.weight.detach().double()
        tall = W.shape[0] > W.shape[1]
        A = W.mT if tall else W
        values, vectors = torch.linalg.eigh(A @ A.mT)
        U, S = vectors.flip(-1), values.flip(-1).clamp_min(0).sqrt()
        V = torch.linalg.qr(A.mT @ U / S).Q
        V = V * (V * (A.mT @ U)).sum(0).sign()
        U, V = (V, U) if tall else (U, V)
        found[name] = Decomposition(W.float(), U.float(), S.float(), V.float())
    return found


@dataclass
class Contender:
    """A way to train a model, ready to step.

    Attributes:
        phases: seconds of forward, backward, optimizer and fold, one entry for each step.
        delta: what has been added to a matrix, by its name.
    """

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    delta: Callable[[str], Tensor]
    sculptor: Sculptor | None = None
    phases: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self._stepped = 0.0
        self.optimizer.register_step_post_hook(self._note)
        # After ours, so that what follows the optimizer is the fold.
        if self.sculptor is not None:
            self.sculptor.attach(self.optimizer)

    def _note(self, *_: Any) -> None:
        self._stepped = self._now()

    def _now(self) -> float:
        if next(self.model.parameters()).is_cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return clock()

    @property
    def trainable(self) -> int:
        return sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])

    @property
    def optimizer_bytes(self) -> int:
        return optimizer_state_bytes(self.optimizer)

    def step(self, ids: Tensor) -> float:
        """One training step; returns its loss."""
        start = self._now()
        loss = self.model(ids)
        forward = self._now()
        loss.backward()
        backward = self._now()
        self.optimizer.step()
        end = self._now()
        self.optimizer.zero_grad(set_to_none=True)
        parts = {
            "forward": forward - start,
            "backward": backward - forward,
            "optimizer": self._stepped - backward,
            "fold": end - self._stepped,
        }
        for phase, seconds in parts.items():
            self.phases[phase].append(seconds)
        return loss.detach()

    def seconds(self, *, skip: int = 0) -> dict[str, float]:
        """Median seconds of each phase, the first steps left out."""
        return {phase: statistics.median(times[skip:]) for phase, times in self.phases.items()}

    def saved_bytes(self, ids: Tensor) -> int:
        """Bytes that a forward pass keeps for its backward, each storage once."""
        held = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        held |= {b.untyped_storage().data_ptr() for b in self.model.buffers()}
        if self.sculptor is not None:
            for matrix in self.sculptor._task.matrices.values():  # type: ignore[union-attr]
                bases = (matrix.bases.U, matrix.bases.V)
                held |= {B.untyped_storage().data_ptr() for B in bases if B is not None}
        saved: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            pointer = tensor.untyped_storage().data_ptr()
            if pointer not in held:
                saved[pointer] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.model(ids)
        return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())

    def worst_leak(self, known: dict[str, Decomposition], ratio: float) -> float:
        """Largest share of an update in the protected subspaces, over all matrices."""
        worst = 0.0
        for name, found in known.items():
            h = preserved(found, ratio)
            delta = self.delta(name).double()
            worst = max(worst, leak(delta, found.U[:, :h], found.V[:, :h]).strict)
        return worst

    def rounding_floor(self, known: dict[str, Decomposition]) -> float:
        """What rounding the weights to float32 leaves of a leak anyway, `2⁻²⁴ ‖W‖ / ‖ΔW‖`."""
        norms = ((found.S.norm(), self.delta(name).norm()) for name, found in known.items())
        return max(float(2**-24 * W / delta) for W, delta in norms)


def preserved(found: Decomposition, ratio: float) -> int:
    return len(found.S) - int(ratio * len(found.S))


def make(
    method: str,
    ratio: float,
    build: Callable[[], Llama],
    known: dict[str, Decomposition],
    *,
    lr: float = 1e-4,
) -> Contender:
    """A contender of its own model; `build` gives the same weights every time.

    Args:
        method: `"plain"`, `"sculpt"`, `"sculpt/disk"` with the weights before the task in files,
            `"osf"` or `"lora"`; the last two need PEFT.
        ratio: trainable fraction, of sculpt and OSF.
    """
    model = build()
    matrices = model.matrices()

    def delta(name: str) -> Tensor:
        return matrices[name].weight.detach() - known[name].W

    if method == "plain":
        model.requires_grad_(False)
        trained = [module.weight for module in matrices.values()]
        for weight in trained:
            weight.requires_grad_(True)
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)
        return Contender(method, model, optimizer, delta)
    if method.startswith("sculpt"):
        originals = "disk" if method == "sculpt/disk" else "auto"
        sculptor = Sculptor(model, SculptConfig(unfreeze_rank_ratio=ratio, originals=originals))
        given = {name: found.low(preserved(found, ratio)) for name, found in known.items()}
        sculptor.begin_task(subspaces=given)
        trained = sculptor.parameters()
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)
        return Contender(method, model, optimizer, delta, sculptor)
    return _with_peft(method, ratio, model, known, lr)


def _with_peft(
    method: str, ratio: float, model: Llama, known: dict[str, Decomposition], lr: float
) -> Contender:
    import peft
    from peft.tuners.osf import layer as osf

    targets = sorted({name.rpartition(".")[2] for name in model.matrices()})
    if method == "lora":
        config: Any = peft.LoraConfig(r=LORA_RANK, target_modules=targets, lora_dropout=0.0)
        adapted = peft.get_peft_model(model, config)
    else:
        config = peft.OSFConfig(effective_rank=1 - ratio, target_modules=targets)
        # The same singular vectors, without a second decomposition of every matrix.
        by_weight = {
            model.get_submodule(name).weight.data_ptr(): found for name, found in known.items()
        }
        theirs = osf.decompose_weight_matrix

        def ours(weight: Tensor, top_k: int) -> dict[str, Any]:
            found = by_weight[weight.data_ptr()]
            parts = {"U": found.U, "S": found.S, "V": found.V.mT}
            high = {"U": parts["U"][:, :top_k], "S": parts["S"][:top_k], "V": parts["V"][:top_k]}
            low = {"U": parts["U"][:, top_k:], "S": parts["S"][top_k:], "V": parts["V"][top_k:]}
            split = {f"{key}_high": value.contiguous() for key, value in high.items()}
            split |= {
                f"{key}_low": nn.Parameter(value.clone(memory_format=torch.contiguous_format))
                for key, value in low.items()
            }
            return split | {"rank_high": top_k}

        osf.decompose_weight_matrix = ours
        try:
            adapted = peft.get_peft_model(model, config)
        finally:
            osf.decompose_weight_matrix = theirs
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)

    def delta(name: str) -> Tensor:
        layer = adapted.base_model.model.get_submodule(name)
        change: Tensor = layer.get_delta_weight("default")
        return change.detach()

    return Contender(method, adapted, optimizer, delta)
