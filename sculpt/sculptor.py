"""The life cycle of a task: choose subspaces, train in them, prove, fold, go on."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.optim.optimizer import Optimizer

from sculpt.certificate.leak import Certificate
from sculpt.certificate.running import certify
from sculpt.config import SculptConfig, config_to_json
from sculpt.curvature.capacity import Capacity
from sculpt.curvature.collect import checked, collect
from sculpt.curvature.generated import share_of_distinct, written_by
from sculpt.curvature.memory import Memory
from sculpt.distributed.processes import Processes
from sculpt.distributed.sharding import device_of, reshard, sharded_modules
from sculpt.messages import SculptWarning, some
from sculpt.storage import task as state
from sculpt.storage.background import Background, Saving
from sculpt.task.agreement import check_agreement
from sculpt.task.choose import choose
from sculpt.task.engines import warn_that_gradients_leak
from sculpt.task.running import RunningTask
from sculpt.task.supported import refuse_model
from sculpt.task.table import TaskRow, TaskTable
from sculpt.task.targets import find_targets
from sculpt_kernels import Subspace

DISTINCT = 0.5
"""Share of distinct runs of tokens below which generated text repeats itself."""

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
    `C` `(t, t)`, at least float32, and the weight is `W₀ + γ U_l C V_lᵀ` with the trailing bases
    and a constant `γ`: whatever the optimizer does to `C`, `U_hᵀ ΔW = 0` and `ΔW V_h = 0`.
    `SculptConfig.engine` has other ways.

    Args:
        model: any `nn.Module` on one device.
        config: what to sculpt and how much of it.
        group: the processes that train this model together, where `torch.distributed` is
            initialised; default: all of them.

    Attributes:
        memory: what earlier tasks use, as `protect` and `end_task` have added it up.

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
        self.memory = Memory()
        self._task: RunningTask | None = None
        self._group = group
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
            calibration: batches of this task, where something is protected: its directions are
                then those that it uses most for each unit that earlier tasks need; without them
                those that earlier tasks use least. Ranks that adapt to data need batches, too.
                A batch is a mapping of keyword arguments of the model, a tensor, a tuple, or a
                function of the model that returns the summed loss of its rows. In several processes
                each passes its own.
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
            self.model, targets.chosen, self.config, self.memory, calibration,
            dict(subspaces or {}), processes, progress,
        )  # fmt: skip
        task = RunningTask(self.model, self.config, chosen.targets, chosen.bases, name, self._group)
        self._start(task)
        rows = [TaskRow.of(m, chosen.importance.get(m.name)) for m in task.matrices.values()]
        seconds = time.perf_counter() - start
        return TaskTable(name, rows, targets.left_out, seconds, list(task.others))

    def protect(self, batches: Any, name: str = "") -> None:
        """Add rows to what later tasks must not forget: sums over them, no row is kept.

        Args:
            batches: mappings of keyword arguments of the model with labels, or functions of the
                model that return the summed loss of their rows. In several processes each passes
                its own.
            name: under which the rows are counted.

        Raises:
            RuntimeError: a task is running; `end_task(batches)` protects its rows.
            TypeError, ValueError: the batches cannot be used. Nothing has been changed then.
        """
        targets = find_targets(self.model, self.config).chosen
        reshard(sharded_modules(self.model))
        processes = Processes(self._group, device_of(targets[0].parameter))
        self.memory.check(targets)
        found = collect(self.model, targets, batches, self.memory, self.config, processes, name)
        self.memory.merge(found)
        missed = [target.name for target in targets if self.memory.of(target.name) is None]
        if missed:
            warnings.warn(
                f"no row of what is protected reached {some(missed)}: their subspaces stay those "
                "of the weights",
                SculptWarning,
                stacklevel=2,
            )
        few = [target.name for target in targets if self.memory.is_thin(target.name)]
        if few:
            warnings.warn(
                f"fewer tokens than directions are protected at {some(few)}: directions that these "
                "did not use look free and may not be; protect more rows",
                SculptWarning,
                stacklevel=2,
            )

    def protect_generated(
        self, tokenizer: Any, tokens: int = 20_000, *, length: int = 128, seed: int = 0
    ) -> None:
        """Protect what the model can do now, by text that it writes itself: no data is needed.

        Args:
            tokenizer: of the causal language model.
            tokens: how many are written at least; length: of a row at most; seed: of the text.

        Raises:
            RuntimeError: a task is running.
            TypeError, ValueError: the model does not write text, or an argument does not fit.
        """
        refuse_model(self.model)
        processes = Processes(self._group, device_of(next(self.model.parameters())))
        batches = written_by(self.model, tokenizer, tokens, length, seed, processes.size)
        distinct = share_of_distinct(batches)
        if distinct < DISTINCT:
            warnings.warn(
                f"the text that the model wrote repeats itself: {distinct:.0%} of its runs of 4 "
                "tokens are distinct. It protects little; protect(batches) takes text of yours",
                SculptWarning,
                stacklevel=2,
            )
        own = slice(processes.rank, None, processes.size)
        self.protect([{k: v[own] for k, v in batch.items()} for batch in batches], "generated")

    def save_memory(self, path: FilePath) -> None:
        """Write what is protected to a safetensors file, atomically: it goes beside the model.

        Args:
            path: the file, or a directory, in which it is `sculpt_memory.safetensors`.

        Raises:
            RuntimeError: nothing is protected.
        """
        if not self.memory:
            raise RuntimeError("nothing is protected: call protect() or end_task(batches) first")
        processes = Processes(self._group, device_of(next(self.model.parameters())))
        with processes.as_one() as first:
            if first:
                self.memory.save(Path(path), self.model)

    def load_memory(self, path: FilePath) -> None:
        """Add what `save_memory` wrote to what later tasks must not forget.

        Args:
            path: as for `save_memory`.

        Raises:
            RuntimeError: a task is running.
            FileNotFoundError, ValueError: there is no such file, it is damaged, or it is of another
                model or other targets. Nothing has been changed then.
        """
        targets = find_targets(self.model, self.config).chosen
        loaded = Memory.load(Path(path), self.model, device_of(targets[0].parameter))
        loaded.check(targets)
        self.memory.merge(loaded)

    def capacity(self, limit: float = 0.01) -> Capacity:
        """How many directions of each layer earlier tasks hardly use, and how long they last.

        Args:
            limit: the share of what they use, `tr S tr A`, that may be in those directions.

        Raises:
            ValueError: nothing is protected, or the limit is not in (0, 1).
        """
        targets = find_targets(self.model, self.config).chosen
        return Capacity.of(self.memory, targets, self.config, limit)

    def _start(self, task: RunningTask) -> None:
        self._task = task
        task.hold(self.undo_task)

    @property
    def skipped_steps(self) -> int:
        """Steps of this task that were left out, their gradients not being finite."""
        return self._running().skipped_steps

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and what trains: coordinates by module name, then other parameters by theirs."""
        return self._running().named_parameters()

    def parameters(self) -> list[nn.Parameter]:
        """All that trains, for any torch optimizer, at the learning rate of dense weights.

        Coordinates are scaled: a step of an optimizer that normalises its elements, such as AdamW,
        moves a weight as far as it would move the dense one.
        """
        return [parameter for _, parameter in self.named_parameters()]

    def attach(self, optimizer: Optimizer) -> None:
        """Keep the weights current: from now on each `optimizer.step()` ends by updating them.

        Steps whose gradients are not finite are left out (`SculptConfig.skip_nonfinite`). What is
        done to coordinates outside of a step, by averages or by an optimizer that swaps them, the
        weights follow before the next forward; in a compiled model call `update_weights()`.

        Raises:
            RuntimeError: no task is running, or an optimizer is attached.
            TypeError, ValueError: the optimizer does not hold all coordinates of this task, or its
                state is that of another one.
        """
        self._running().attach(optimizer)

    def is_attached(self, optimizer: Optimizer) -> bool:
        """Whether steps of this optimizer end by updating the weights of the running task."""
        return self._task is not None and self._task.is_attached(optimizer)

    def update_weights(self) -> None:
        """Bring every weight up to date with its coordinates, as each step does once attached.

        Where that fails, for want of memory for instance, coordinates and weights go back to before
        the step; weights that were rounded at random by then stay, with their coordinates, and
        what the other engines train is projected with the next one.

        Raises:
            RuntimeError: no task is running.
        """
        self._running().update_weights()

    @torch.no_grad()
    def verify(self, *, independent: bool = False, progress: Progress | None = None) -> Certificate:
        """Measure the leak of `ΔW` since `begin_task`, in float64, from the weights before and now.

        float32 and float64 weights are judged as they are. bfloat16 and float16 ones are judged by
        their float32 truth `W₀ + ΔW`, and must be as near to it as rounding allows.

        Args:
            independent: decompose the weights before the task afresh in float64 and take their
                leading singular vectors for the protected subspaces. Otherwise the bases of the
                task are trusted: what is outside the span of the trainable ones counts as
                protected, which is stricter on the longer side of a matrix.
            progress: called as `progress(done, total, module_name)`.

        Raises:
            RuntimeError: no task is running, or none of its steps has changed anything.
        """
        task = self._running()
        if independent and any(
            m.bases.method.startswith("curvature") for m in task.matrices.values()
        ):
            raise ValueError(
                "independent=True decomposes the weights before the task, and this one has its "
                "subspaces from curvature; use independent=False"
            )
        matrices = list(task.checked().values())
        task.settle(refuse=False)
        task.refuse_idle_steps()
        return certify(
            matrices,
            self.config.constraint,
            task.name,
            tuple(task.others),
            self.memory,
            task.processes,
            independent=independent,
            progress=progress,
        )

    @torch.no_grad()
    def end_task(self, batches: Any = None) -> None:
        """Round what was learned into the weights, once; the model is a plain one again.

        Keys, shapes, dtypes and `requires_grad` flags are those from before the task.

        Args:
            batches: rows of this task that later ones must not forget, as for `protect`.

        Raises:
            RuntimeError: no task is running; or none of its steps has changed anything, or a weight
                was written to in a way that the task cannot have changed it. The task is still
                running then, and `undo_task` ends it.
            TypeError, ValueError: the batches cannot be used. Where that shows before they pass
                through the model the task is still running; a loss that is not finite leaves it
                ended, and `protect` takes other batches.
        """
        task = self._running()
        task.checked()
        if batches is not None:
            batches = checked(batches, task.processes)
        task.settle(refuse=True)
        task.refuse_idle_steps()
        if self.config.chosen_engine == "gradient":
            warn_that_gradients_leak(max(self.verify().rows, key=lambda row: row.leak))
        task.leave()
        self._task = None
        if batches is not None:
            self.protect(batches, task.name or "")

    @torch.no_grad()
    def undo_task(self) -> None:
        """End the task without what it learned: all weights are those from before, bit by bit.

        Parameters that trained outside of the guarantee stay as they are, with a warning.

        Raises:
            RuntimeError: no task is running.
        """
        task = self._running()
        task.leave(undo=True)
        self._task = None
        if task.others:
            names = list(task.others)
            warnings.warn(
                f"{len(names)} parameters that others='train' has trained stay as they are: "
                f"{some(names)}",
                SculptWarning,
                stacklevel=2,
            )

    def save(self, path: FilePath, *, previous: FilePath | None = None) -> None:
        """Write the running task to a directory: safetensors and JSON, atomically, never pickle.

        The model's weights and the optimizer are the caller's to save. Weights that are recomputed
        from coordinates follow from what is written here; others are known by their checksum.

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
        parts.write(Path(path), about, self._running().processes)

    def save_async(self, path: FilePath, *, previous: FilePath | None = None) -> Saving:
        """As `save`, but training goes on as soon as what is written has been copied to the host.

        Another save waits for the end of this one. Ask for `result()` before processes part.

        Returns:
            The save under way: `result()` waits and raises what went wrong.
        """
        about, parts = self._to_save(previous)
        processes = self._running().processes
        write = partial(parts.copied(processes).write, Path(path), about)
        return self._background.start(write, processes)

    def _to_save(self, previous: FilePath | None) -> tuple[dict[str, Any], state.Parts]:
        task = self._running()
        matrices = list(task.checked().values())
        self._background.settle()
        about = {
            "format": state.FORMAT,
            "config": config_to_json(self.config),
            "id": task.id,
            "task": task.name,
            "skipped_steps": task.skipped_steps,
            "seed": int(task.seeds[0]),
            "requires_grad": state.flags_by_name(self.model, task.flags),
            "matrices": state.describe(matrices, task.processes),
        }
        last = None if previous is None else Path(previous)
        memory = self.memory.tensors()
        return about, state.Parts.of(matrices, memory, task.id, last, task.processes)

    @property
    def weights_follow(self) -> bool:
        """Whether all weights of the running task follow from what `save` writes."""
        return all(state.derives_weight(matrix) for matrix in self._running().checked().values())

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
        flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
        # What is frozen is no target, and was none when the task began.
        state.put_flags(model, about["requires_grad"])
        try:
            sculptor = cls(model, SculptConfig(**about["config"]), group=group)
            reshard(sharded_modules(model))
            known = about["matrices"]
            targets = state.targets_of(model, sculptor.config, known)
            processes = Processes(group, device_of(targets[0].parameter))
            parts = state.read(Path(path), about, targets, processes)
            found = [
                state.bases_of(target, known[target.name], parts["task"]) for target in targets
            ]
        except BaseException:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
            raise
        weights = {target.name: parts["task"][f"{target.name}/original"] for target in targets}
        task = RunningTask(model, sculptor.config, targets, found, about["task"], group, weights)
        sculptor._start(task)
        if "memory" in parts:
            sculptor.memory = Memory.from_tensors(parts["memory"], processes.device)
        task.id, task.skipped_steps = about["id"], about["skipped_steps"]
        task.seeds += about["seed"] - int(task.seeds[0])
        matrices = list(task.checked().values())
        state.resume(matrices, parts["coordinates"], known)
        state.check_weights(matrices, known, processes)
        task.note()
        return sculptor

    def _running(self) -> RunningTask:
        if self._task is None:
            raise RuntimeError("no task is running; call begin_task() first")
        return self._task
