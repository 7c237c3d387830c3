"""The life cycle of a task: choose subspaces, train in them, prove, fold, go on."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim.optimizer import Optimizer

from sculpt import state
from sculpt.accumulate import Learned
from sculpt.certificate import Certificate
from sculpt.choice import choose
from sculpt.config import SculptConfig
from sculpt.distributed.agreement import check_agreement, check_replicas
from sculpt.distributed.background import Background, Saving
from sculpt.distributed.processes import Processes
from sculpt.distributed.sharding import device_of, reshard, sharded_modules
from sculpt.engines import (
    Originals,
    check_holds,
    follow_all,
    freeze,
    make_matrix,
    warn_that_gradients_leak,
)
from sculpt.matrices import Matrix
from sculpt.proof import certify
from sculpt.standing import Modules, hold, release
from sculpt.stepping import Attachment
from sculpt.stray import Watch
from sculpt.subspaces import Bases
from sculpt.targets import Target, find_targets
from sculpt.task import TaskRow, TaskTable
from sculpt_kernels import Subspace

Progress = Callable[[int, int, str], None]
FilePath = str | os.PathLike[str]


class Sculptor:
    """Continual full fine-tuning of `model` without touching what its matrices already hold.

        sculptor = Sculptor(model, SculptConfig(unfreeze_rank_ratio=0.25))
        sculptor.begin_task(name="first")
        optimizer = torch.optim.AdamW(sculptor.parameters(), lr=1e-5)
        sculptor.attach(optimizer)
        ...                                  # the usual loop: forward, backward, optimizer.step()
        print(sculptor.verify())
        sculptor.end_task()                  # a plain model again

    Each target `W` keeps its leading singular subspaces `U_h`, `V_h`. The task trains coordinates
    `C` `(t, t)`, float32, and the weight is `W₀ + γ U_l C V_lᵀ` with the trailing bases and a
    constant `γ`: whatever the optimizer does to `C`, `U_hᵀ ΔW = 0` and `ΔW V_h = 0`.
    `SculptConfig.engine` has other ways.

    Args:
        model: any `nn.Module` on one device.
        config: what to sculpt and how much of it.
        group: the processes that train this model together, where `torch.distributed` is
            initialised; default: all of them.

    Attributes:
        learned: with `protect="accumulate"`: what tasks have learned, and the room that is left.
        skipped_steps: steps of this task that were left out, their gradients not being finite.

    Raises:
        ValueError: nothing in the model fits the configuration.
    """

    def __init__(
        self, model: nn.Module, config: SculptConfig, *, group: ProcessGroup | None = None
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
        if not isinstance(config, SculptConfig):
            raise TypeError(f"config must be a SculptConfig; got {type(config).__name__}")
        find_targets(model, config)
        self.model = model
        self.config = config
        self.learned = Learned(config) if config.protect == "accumulate" else None
        self.skipped_steps = 0
        self._task: dict[str, Matrix] | None = None
        self._task_name: str | None = None
        self._task_id = ""
        self._requires_grad: dict[nn.Parameter, bool] = {}
        self._others: dict[str, nn.Parameter] = {}
        self._group = group
        self._attached: Attachment | None = None
        self._background = Background()

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
            calibration: batches of the task before (for the first task, of its own) for ranks that
                adapt to data; others take none. A batch is a mapping of keyword arguments of the
                model, a tensor, a tuple, or a function of the model (one that returns a loss, for
                `importance="fisher"`). In several processes each passes its own.
            name: of the task, for tables and certificates.
            subspaces: trailing bases by module name, where they are known already; float32 for
                float32, bfloat16 and float16 weights, float64 for float64.
            progress: called as `progress(done, total, module_name)` after each decomposition.

        Returns:
            A table of every target and of every parameter left out, with the reason.

        Raises:
            RuntimeError: a task is running.
            TypeError, ValueError: a weight is not finite, a given basis does not fit, calibration
                data are missing or cannot be used, or a budget cannot be met. Nothing has been
                changed then.
        """
        if self._task is not None:
            raise RuntimeError("a task is running; call end_task() before begin_task()")
        if torch.is_inference_mode_enabled():
            raise RuntimeError("begin_task() makes what trains; call it outside of inference_mode")
        start = time.perf_counter()
        targets = find_targets(self.model, self.config)
        reshard(sharded_modules(self.model))
        processes = Processes(self._group, device_of(targets.chosen[0].parameter))
        check_agreement(processes, self.config, name, targets.chosen)
        chosen = choose(
            self.model, targets.chosen, self.config, self.learned, calibration,
            dict(subspaces or {}), processes, progress,
        )  # fmt: skip
        self._start(chosen.targets, chosen.bases, name)
        rows = [TaskRow.of(m, chosen.importance.get(m.name)) for m in self._running().values()]
        left_out, seconds = targets.left_out | chosen.full, time.perf_counter() - start
        return TaskTable(name, rows, left_out, seconds, list(self._others))

    def _start(
        self,
        targets: list[Target],
        found: list[Bases],
        name: str | None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Freeze the rest and give every target what its engine needs.

        `weights` are those before the task, where it has begun already.
        """
        weights = weights or {target.name: target.parameter for target in targets}
        self._originals = Originals(self.config)
        originals = [self._originals.keep(target, weights[target.name]) for target in targets]
        self._requires_grad = {p: p.requires_grad for p in self.model.parameters()}
        self._others = freeze(self.model, targets, self.config)
        if self.config.chosen_engine == "gradient":
            warn_that_gradients_leak()
        self._sharded = sharded_modules(self.model)
        self._processes = Processes(self._group, device_of(targets[0].parameter))
        self._task_name, self._task_id = name, uuid.uuid4().hex
        self.skipped_steps = 0
        self._modules = Modules(self.model, {p.path: p.module for t in targets for p in t.places})
        task = {
            target.name: make_matrix(target, bases, original, self.config)
            for target, bases, original in zip(targets, found, originals, strict=True)
        }
        self._task = task
        self._watch = Watch(task.values())
        hold(self.model, [matrix.trained for matrix in task.values()])
        device = targets[0].parameter.device
        # A seed is used once: by one matrix in one update of one task.
        self._seeds = self.config.seed + torch.arange(len(task), device=device) * 2**20

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and what trains: coordinates by module name, then other parameters by theirs."""
        for name, matrix in self._running().items():
            yield name, matrix.trained
        yield from self._others.items()

    def parameters(self) -> list[nn.Parameter]:
        """All that trains, for any torch optimizer, at the learning rate of dense weights.

        Coordinates are scaled: a step of an optimizer that normalises its elements, such as AdamW,
        moves a weight as far as it would move the dense one.
        """
        return [parameter for _, parameter in self.named_parameters()]

    def attach(self, optimizer: Optimizer) -> None:
        """Keep the weights current: from now on each `optimizer.step()` ends by updating them.

        Steps whose gradients are not finite are left out (`SculptConfig.skip_nonfinite`).

        Raises:
            RuntimeError: no task is running, or an optimizer is attached.
            TypeError, ValueError: the optimizer does not hold all coordinates of this task.
        """
        if self._attached is not None:
            raise RuntimeError("an optimizer is attached already; one task takes one optimizer")
        matrices = self._running().values()
        check_holds(optimizer, matrices)
        for matrix in matrices:
            matrix.attached()
        self._watch.follow(optimizer)
        self._attached = Attachment(
            optimizer,
            self._modules.check, self.update_weights, self._skipped, self._before_first,
            skip_nonfinite=self.config.skip_nonfinite, processes=self._processes,
        )  # fmt: skip

    def _skipped(self) -> int:
        self.skipped_steps += 1
        return self.skipped_steps

    def _before_first(self, optimizer: Optimizer) -> None:
        check_holds(optimizer, self._running().values())
        check_replicas(self._processes, dict(self.named_parameters()))

    @torch.no_grad()
    def update_weights(self) -> None:
        """Bring every weight up to date with its coordinates, as each step does once attached.

        Where that fails, for want of memory for instance, coordinates and weights go back to before
        the step; weights that train themselves are projected with the next one.
        """
        matrices = list(self._running().values())
        self._watch.driven = True
        follow_all(matrices, self._seeds)
        self._seeds += len(matrices) * 2**20

    @torch.no_grad()
    def verify(self, *, independent: bool = False, progress: Progress | None = None) -> Certificate:
        """Measure the leak of `ΔW` since `begin_task`, in float64, from the weights before and now.

        float32 and float64 weights are judged as they are; bfloat16 and float16 ones by their
        float32 truth `W₀ + U C Vᵀ`, with the distance of the stored weights beside it.

        Args:
            independent: decompose the weights before the task afresh in float64 and take their
                leading singular vectors for the protected subspaces. Otherwise the bases of the
                task are trusted: what is outside the span of the trainable ones counts as
                protected, which is stricter on the longer side of a matrix.
            progress: called as `progress(done, total, module_name)`.

        Raises:
            RuntimeError: no task is running.
        """
        if independent and self.learned is not None and self.learned.rooms:
            raise ValueError("independent=True cannot find what protect='accumulate' has learned")
        return certify(
            list(self._running().values()),
            self.config.constraint,
            self._task_name,
            tuple(self._others),
            self._processes,
            independent=independent,
            progress=progress,
        )

    @torch.no_grad()
    def end_task(self) -> None:
        """Round what was learned into the weights, once; the model is a plain one again.

        Keys, shapes, dtypes and `requires_grad` flags are those from before the task.

        Raises:
            RuntimeError: no task is running.
        """
        matrices = self._running()
        if self.config.chosen_engine == "gradient":
            warn_that_gradients_leak(max(self.verify().rows, key=lambda row: row.leak))
        if self.learned is not None:
            self.learned.add(list(matrices.values()))
        for matrix in matrices.values():
            matrix.end()
        if self._attached is not None:
            self._attached.end()
        self._watch.remove()
        release(self.model)
        for parameter, flag in self._requires_grad.items():
            parameter.requires_grad_(flag)
        self._originals.close()
        self._requires_grad, self._others = {}, {}
        self._task = self._task_name = self._attached = None

    def save(self, path: FilePath, *, previous: FilePath | None = None) -> None:
        """Write the running task to a directory: safetensors and JSON, atomically, never pickle.

        The model's weights and the optimizer are the caller's to save. float32 weights, and
        recomputed ones, follow from what is written here; others are known by their checksum.

        Args:
            path: made where it does not exist. An earlier save in it stays whole until this one is
                complete, and is taken away then.
            previous: directory of an earlier save. Where that is of the same task, bases and
                original weights, which do not change during a task, are linked, not written again.

        Raises:
            RuntimeError: no task is running.
            Exception: what went wrong with an earlier `save_async`, where nobody has asked it.
        """
        about, parts = self._to_save(previous)
        parts.write(Path(path), about, self._processes)

    def save_async(self, path: FilePath, *, previous: FilePath | None = None) -> Saving:
        """As `save`, but training goes on as soon as what is written has been copied to the host.

        Another save waits for the end of this one. Ask for `result()` before processes part.

        Returns:
            The save under way: `result()` waits and raises what went wrong.
        """
        about, parts = self._to_save(previous)
        write = partial(parts.copied(self._processes).write, Path(path), about)
        return self._background.start(write, self._processes)

    def _to_save(self, previous: FilePath | None) -> tuple[dict[str, Any], state.Parts]:
        matrices = list(self._running().values())
        self._background.settle()
        about = {
            "format": state.FORMAT,
            "config": state.config_to_json(self.config),
            "id": self._task_id,
            "task": self._task_name,
            "skipped_steps": self.skipped_steps,
            "seed": int(self._seeds[0]),
            "requires_grad": state.flags_by_name(self.model, self._requires_grad),
            "matrices": state.describe(matrices, self._processes),
        }
        learned = None if self.learned is None else self.learned.tensors()
        last = None if previous is None else Path(previous)
        return about, state.Parts.of(matrices, learned, self._task_id, last, self._processes)

    @property
    def weights_follow(self) -> bool:
        """Whether all weights of the running task follow from what `save` writes."""
        return all(state.derives_weight(matrix) for matrix in self._running().values())

    @classmethod
    def load(
        cls, model: nn.Module, path: FilePath, *, group: ProcessGroup | None = None
    ) -> Sculptor:
        """The sculptor that `save` wrote, its task running; nothing is decomposed again.

        Make an optimizer from `parameters()`, give it its saved state, and `attach` it.

        Args:
            model: a plain model with the weights of the moment of saving, divided or not.
            path: directory written by `save`, by any number of processes.
            group: as for `Sculptor`.

        Raises:
            FileNotFoundError, ValueError: there is no such save, it is damaged, or the model does
                not fit it. The model has not been changed then, except for an error in its weights.
        """
        about = state.read_about(Path(path))
        sculptor = cls(model, SculptConfig(**about["config"]), group=group)
        reshard(sharded_modules(model))
        known = about["matrices"]
        targets = state.targets_of(model, sculptor.config, known)
        processes = Processes(group, device_of(targets[0].parameter))
        parts = state.read(Path(path), about, targets, processes)
        found = [state.bases_of(target, known[target.name], parts["task"]) for target in targets]
        state.put_flags(model, about["requires_grad"])
        weights = {target.name: parts["task"][f"{target.name}/original"] for target in targets}
        sculptor._start(targets, found, about["task"], weights)
        if sculptor.learned is not None:
            sculptor.learned.restore(parts["learned"], processes.device)
        sculptor._task_id, sculptor.skipped_steps = about["id"], about["skipped_steps"]
        sculptor._seeds += about["seed"] - int(sculptor._seeds[0])
        matrices = list(sculptor._running().values())
        state.resume(matrices, parts["coordinates"])
        state.check_weights(matrices, known, processes)
        return sculptor

    def _running(self) -> dict[str, Matrix]:
        if self._task is None:
            raise RuntimeError("no task is running; call begin_task() first")
        reshard(self._sharded)
        self._modules.check()
        for matrix in self._task.values():
            matrix.check_in_place()
            matrix.check_weight()
        return self._task
