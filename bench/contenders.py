"""One model, trained in four ways: plain, sculpt, PEFT's OSF, PEFT's LoRA.

All train the same matrices with `AdamW(fused=True)` and freeze the rest. Their singular vectors are
found once, or made up at random where only time is asked for.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bench.llama import Llama
from bench.timing import clock
from sculpt import SculptConfig, Sculptor
from sculpt.memory import optimizer_state_bytes
from sculpt_kernels import Subspace, leak, orthonormalize

RATIOS = {"1/2": 0.5, "1/4": 0.25, "1/8": 0.125}
LORA_RANK = 32


@dataclass(frozen=True)
class Decomposition:
    """One matrix before training and its thin singular vectors."""

    W: Tensor
    U: Tensor
    S: Tensor
    V: Tensor

    def low(self, h: int) -> Subspace:
        U, V = self.U[:, h:].contiguous(), self.V[:, h:].contiguous()
        return Subspace(U, V, h, "low", 1.0, "given")

    def triplets(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.U, self.S, self.V


class Random:
    """Made-up vectors of a matrix, as many as are asked for: a step with them takes as long."""

    def __init__(self, weight: Tensor) -> None:
        self.W = weight

    def low(self, h: int) -> Subspace:
        t = min(self.W.shape) - h
        U, V = (orthonormalize(B[:, :t].float()).to(self.W.dtype) for B in self._sides())
        return Subspace(U, V, h, "low", 1.0, "random")

    def triplets(self) -> tuple[Tensor, Tensor, Tensor]:
        U, V = self._sides()
        return U, self.W.new_ones(min(self.W.shape)), V

    def _sides(self) -> Iterator[Tensor]:
        for size in self.W.shape:
            yield self.W.new_empty(size, min(self.W.shape)).normal_() / size**0.5


Known = Mapping[str, Decomposition] | Mapping[str, Random]


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
            h = preserved(found.W, ratio)
            delta = self.delta(name).double()
            worst = max(worst, leak(delta, found.U[:, :h], found.V[:, :h]).strict)
        return worst

    def rounding_floor(self, known: dict[str, Decomposition]) -> float:
        """What rounding the weights to float32 leaves of a leak anyway, `2⁻²⁴ ‖W‖ / ‖ΔW‖`."""
        norms = ((found.S.norm(), self.delta(name).norm()) for name, found in known.items())
        return max(float(2**-24 * W / delta) for W, delta in norms)


def make(
    method: str, ratio: float, model: Llama, known: Known, *, lr: float = 1e-4, **options: Any
) -> Contender:
    """A contender that trains this model.

    Args:
        method: `"plain"`, `"sculpt"`, `"sculpt/disk"` with the weights before the task in files,
            `"osf"` or `"lora"`; the last two need PEFT.
        ratio: trainable fraction, of sculpt and OSF.
        known: the matrices that sculpt and OSF start from.
        options: fields of `SculptConfig`.
    """
    matrices, sculptor = model.matrices(), None

    def delta(name: str) -> Tensor:
        return matrices[name].weight.detach() - known[name].W

    if method == "plain":
        model.requires_grad_(False)
        trained = [module.weight for module in matrices.values()]
        for weight in trained:
            weight.requires_grad_(True)
    elif method.startswith("sculpt"):
        originals = "disk" if method == "sculpt/disk" else "auto"
        config = SculptConfig(unfreeze_rank_ratio=ratio, originals=originals, **options)
        sculptor = Sculptor(model, config)
        cut = {name: preserved(module.weight, ratio) for name, module in matrices.items()}
        sculptor.begin_task(subspaces={name: known[name].low(h) for name, h in cut.items()})
        trained = sculptor.parameters()
    else:
        adapted = _adapted(method, ratio, model, known)
        trained = [p for p in adapted.parameters() if p.requires_grad]

        def delta(name: str) -> Tensor:
            layer = adapted.base_model.model.get_submodule(name)
            change: Tensor = layer.get_delta_weight("default")
            return change.detach()

        model = adapted
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)
    return Contender(method, model, optimizer, delta, sculptor)


def preserved(W: Tensor, ratio: float) -> int:
    return min(W.shape) - int(ratio * min(W.shape))


def _adapted(method: str, ratio: float, model: Llama, known: Known) -> Any:
    import peft
    from peft.tuners.osf import layer as osf

    targets = sorted({name.rpartition(".")[2] for name in model.matrices()})
    if method == "lora":
        lora: Any = peft.LoraConfig(r=LORA_RANK, target_modules=targets, lora_dropout=0.0)
        return peft.get_peft_model(model, lora)  # type: ignore[arg-type]
    by_weight = {module.weight.data_ptr(): known[n] for n, module in model.matrices().items()}

    def given(weight: Tensor, top_k: int) -> dict[str, Any]:
        """What PEFT computes, without a decomposition of every matrix."""
        U, S, V = by_weight[weight.data_ptr()].triplets()
        parts = {"U": (U[:, :top_k], U[:, top_k:]), "S": (S[:top_k], S[top_k:]),
                 "V": (V.mT[:top_k], V.mT[top_k:])}  # fmt: skip
        found: dict[str, Any] = {"rank_high": top_k}
        for name, (high, low) in parts.items():
            found[f"{name}_high"] = high.contiguous()
            found[f"{name}_low"] = nn.Parameter(low.clone(memory_format=torch.contiguous_format))
        return found

    theirs, osf.decompose_weight_matrix = osf.decompose_weight_matrix, given
    try:
        config: Any = peft.OSFConfig(effective_rank=1 - ratio, target_modules=targets)
        return peft.get_peft_model(model, config)  # type: ignore[arg-type]
    finally:
        osf.decompose_weight_matrix = theirs
