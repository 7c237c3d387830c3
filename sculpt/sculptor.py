"""The life cycle of a task: choose subspaces, train coordinates, prove, fold, go on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from sculpt.certificate import Certificate, measure
from sculpt.config import SculptConfig
from sculpt.linear import make_compact, make_plain
from sculpt.targets import Target, find_targets
from sculpt.task import Sculpted, TaskRow, TaskTable
from sculpt_kernels import Subspace, SubspaceCache, expand_add_, split

Progress = Callable[[int, int, str], None]
LOW_PRECISION = (torch.bfloat16, torch.float16)


class Sculptor:
    """Continual full fine-tuning of `model` without touching what its matrices already hold.

        sculptor = Sculptor(model, SculptConfig(unfreeze_rank_ratio=0.25))
        sculptor.begin_task(name="first")
        optimizer = torch.optim.AdamW(sculptor.param_groups(lr=1e-5))
        sculptor.attach(optimizer)
        ...                                  # the usual loop: forward, backward, optimizer.step()
        print(sculptor.verify())
        sculptor.end_task()                  # a plain model again

    Each target `W` keeps its leading singular subspaces `U_h`, `V_h`. The task trains coordinates
    `C` `(t, t)`, float32, and the weight is `W₀ + U_l C V_lᵀ` with the trailing bases: whatever the
    optimizer does to `C`, `U_hᵀ ΔW = 0` and `ΔW V_h = 0`.

    Args:
        model: any `nn.Module` on one device; its targets are plain `nn.Linear` layers.
        config: what to sculpt and how much of it.

    Raises:
        ValueError: nothing in the model fits the configuration.
    """

    def __init__(self, model: nn.Module, config: SculptConfig) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
        if not isinstance(config, SculptConfig):
            raise TypeError(f"config must be a SculptConfig; got {type(config).__name__}")
        find_targets(model, config)
        self.model = model
        self.config = config
        self._task: dict[str, Sculpted] | None = None
        self._task_name: str | None = None
        self._requires_grad: dict[nn.Parameter, bool] = {}
        self._optimizer: Optimizer | None = None
        self._handle: Any = None
        self._updates = 0
        cache = config.subspace_cache
        self._split = split if cache is None else SubspaceCache(cache).split

    def begin_task(
        self,
        calibration: Any = None,
        name: str | None = None,
        *,
        subspaces: Mapping[str, Subspace] | None = None,
        progress: Progress | None = None,
    ) -> TaskTable:
        """Choose ranks and subspaces from the current weights and make the model trainable in them.

        Args:
            calibration: for ranks that adapt to data; uniform ranks take none.
            name: of the task, for tables and certificates.
            subspaces: trailing bases by module name, where they are known already; float32 for
                float32, bfloat16 and float16 weights, float64 for float64.
            progress: called as `progress(done, total, module_name)` after each decomposition.

        Returns:
            A table of every target and of every parameter left out, with the reason.

        Raises:
            RuntimeError: a task is running.
            TypeError, ValueError: a weight is not finite, or a given basis does not fit. Nothing
                has been changed then.
        """
        if self._task is not None:
            raise RuntimeError("a task is running; call end_task() before begin_task()")
        if calibration is not None:
            raise ValueError("calibration is not used by uniform ranks; pass calibration=None")
        start = time.perf_counter()
        targets = find_targets(self.model, self.config)
        given = dict(subspaces or {})
        unknown = sorted(set(given) - {target.name for target in targets.chosen})
        if unknown:
            raise ValueError(f"subspaces names {unknown[0]!r}, which is no target of this model")
        found: list[Subspace] = []
        for done, target in enumerate(targets.chosen, start=1):
            found.append(self._subspace(target, given.get(target.name)))
            if progress is not None:
                progress(done, len(targets.chosen), target.name)

        originals = [self._original(target.module.weight) for target in targets.chosen]
        self._requires_grad = {p: p.requires_grad for p in self.model.parameters()}
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self._task = {}
        self._task_name = name
        self._updates = 0
        rows = []
        for target, low, original in zip(targets.chosen, found, originals, strict=True):
            module = make_compact(target.module, low.U, low.V)
            folded = None if self._recomputes(module.weight) else module.sculpt_C.detach().clone()
            self._task[target.name] = Sculpted(
                target.name, module, target.preserved, original, folded
            )
            rows.append(
                TaskRow(
                    target.name,
                    target.shape,
                    target.preserved,
                    target.trainable_rank,
                    low.energy,
                    low.method,
                )
            )
        return TaskTable(name, rows, targets.left_out, time.perf_counter() - start)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Module names and trainable coordinates `C` `(t, t)`."""
        for name, matrix in self._running().items():
            yield name, matrix.module.sculpt_C

    def parameters(self) -> list[nn.Parameter]:
        """The trainable coordinates, for any torch optimizer."""
        return [parameter for _, parameter in self.named_parameters()]

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Optimizer groups whose steps move the weights as far as AdamW at `lr` would move them.

        A step of an elementwise-normalised optimizer (AdamW, Lion) has about unit entries: it moves
        a dense `m x n` weight by `lr √(mn)` in Frobenius norm, and one trained through `C` by
        `lr t`. Each group's rate is `lr √(mn) / t`.

        Raises:
            RuntimeError: no task is running.
        """
        groups: dict[float, list[nn.Parameter]] = {}
        for matrix in self._running().values():
            m, n = matrix.module.weight.shape
            factor = math.sqrt(m * n) / matrix.module.sculpt_C.shape[0]
            groups.setdefault(factor, []).append(matrix.module.sculpt_C)
        return [{"params": params, "lr": lr * factor} for factor, params in groups.items()]

    def attach(self, optimizer: Optimizer) -> None:
        """Keep the weights current: from now on each `optimizer.step()` ends by updating them.

        Raises:
            RuntimeError: no task is running, or an optimizer is attached already.
            ValueError: the optimizer does not hold all coordinates of this task.
        """
        matrices = self._running()
        if self._optimizer is not None:
            raise RuntimeError("an optimizer is attached already; one task takes one optimizer")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name, m in matrices.items() if id(m.module.sculpt_C) not in held]
        if missing:
            raise ValueError(
                f"optimizer holds {len(matrices) - len(missing)} of the {len(matrices)} trainable "
                f"coordinates of this task (first missing: {missing[0]!r}); make it from "
                "sculptor.parameters() or sculptor.param_groups(lr), after begin_task()"
            )
        self._optimizer = optimizer
        self._handle = optimizer.register_step_post_hook(lambda *_: self.update_weights())

    @torch.no_grad()
    def update_weights(self) -> None:
        """Bring every weight up to date with its coordinates, as each step does once attached."""
        matrices = self._running()
        for index, matrix in enumerate(matrices.values()):
            module = matrix.module
            C, U, V, W = module.sculpt_C, module.sculpt_U, module.sculpt_V, module.weight
            if matrix.folded is None:
                expand_add_(W, C, U, V, base=matrix.original)
            else:
                # A seed is used once: by one matrix in one update of one task.
                seed = self.config.seed + (self._updates * len(matrices) + index) * 2**20
                expand_add_(W, C - matrix.folded, U, V, rounding="stochastic", seed=seed)
                matrix.folded.copy_(C)
        self._updates += 1

    @torch.no_grad()
    def verify(self, *, independent: bool = False, progress: Progress | None = None) -> Certificate:
        """Measure the leak of `ΔW` since `begin_task`, in float64, from the weights before and now.

        float32 and float64 weights are judged as they are; bfloat16 and float16 ones by their
        float32 truth `W₀ + U C Vᵀ`, with the distance of the stored weights beside it.

        Args:
            independent: decompose the weights before the task afresh in float64 and take their
                leading singular vectors for the protected subspaces. Otherwise everything outside
                the span of the trainable bases counts as protected, which is stricter on the longer
                side of a matrix and needs no decomposition.
            progress: called as `progress(done, total, module_name)`.

        Raises:
            RuntimeError: no task is running.
        """
        matrices = self._running()
        rows = []
        for done, matrix in enumerate(matrices.values(), start=1):
            module = matrix.module
            before = matrix.original.to(module.weight.device)
            if independent:
                high = split(before.double(), rank=matrix.preserved, part="high")
                left, right = (high.U, True), (high.V, True)
            else:
                bases = (module.sculpt_U, module.sculpt_V)
                left, right = ((torch.linalg.qr(B.double()).Q, False) for B in bases)
            low_precision = module.weight.dtype in LOW_PRECISION
            after = matrix.truth() if low_precision else module.weight
            stored = module.weight if low_precision else None
            rows.append(measure(matrix.name, before, after, left, right, stored=stored))
            if progress is not None:
                progress(done, len(matrices), matrix.name)
        return Certificate(rows, self._task_name, "recomputed" if independent else "complement")

    @torch.no_grad()
    def end_task(self) -> None:
        """Fold `W₀ + U_l C V_lᵀ`, rounded once, into the weights; the model is a plain one again.

        Keys, shapes, dtypes and `requires_grad` flags are those from before the task.

        Raises:
            RuntimeError: no task is running.
        """
        for matrix in self._running().values():
            module = matrix.module
            base = matrix.original.to(module.weight.device)
            U, V, C = module.sculpt_U, module.sculpt_V, module.sculpt_C
            expand_add_(module.weight, C, U, V, base=base)
            make_plain(module)
        if self._handle is not None:
            self._handle.remove()
        for parameter, flag in self._requires_grad.items():
            parameter.requires_grad_(flag)
        self._requires_grad = {}
        self._task = self._task_name = self._optimizer = self._handle = None

    def _running(self) -> dict[str, Sculpted]:
        if self._task is None:
            raise RuntimeError("no task is running; call begin_task() first")
        return self._task

    def _recomputes(self, weight: Tensor) -> bool:
        return weight.dtype not in LOW_PRECISION or self.config.weight_update == "recompute"

    def _original(self, weight: Tensor) -> Tensor:
        """`W₀`: beside the weight where each step starts from it, else in host memory."""
        device = weight.device if self._recomputes(weight) else torch.device("cpu")
        return weight.detach().to(device, copy=True)

    def _subspace(self, target: Target, given: Subspace | None) -> Subspace:
        weight = target.module.weight.detach()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if given is None:
            try:
                # In float64, so that the span is exact; the bases are rounded once, to float32.
                low = self._split(weight.double(), rank=target.preserved, part="low")
            except ValueError as error:
                raise ValueError(f"{target.name}.weight cannot be split: {error}") from error
            return replace(low, U=low.U.to(dtype), V=low.V.to(dtype))
        if given.part != "low":
            raise ValueError(f"subspaces[{target.name!r}] must have part 'low'; got {given.part!r}")
        for side, basis, size in zip("UV", (given.U, given.V), weight.shape, strict=True):
            expected = (size, target.trainable_rank)
            if (
                tuple(basis.shape) != expected
                or basis.dtype != dtype
                or basis.device != weight.device
            ):
                raise ValueError(
                    f"subspaces[{target.name!r}].{side} must be {expected}, {dtype}, on "
                    f"{weight.device}; got {tuple(basis.shape)}, {basis.dtype}, on {basis.device}"
                )
        return given
