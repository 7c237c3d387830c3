"""One task on one model, from the first change of the model to the last."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim.optimizer import Optimizer

from sculpt.config import SculptConfig
from sculpt.distributed.processes import Processes
from sculpt.distributed.sharding import device_of, reshard, sharded_modules
from sculpt.messages import SculptWarning, some
from sculpt.task.agreement import check_replicas
from sculpt.task.attachment import Attachment
from sculpt.task.bases import Bases
from sculpt.task.engines import (
    check_holds,
    follow_all,
    freeze,
    make_matrix,
    warn_that_gradients_leak,
)
from sculpt.task.guards import (
    OptimizerGuard,
    TrainedModules,
    check_task,
    hold,
    innermost,
    mark_task,
    not_followed,
    release,
)
from sculpt.task.matrix import Matrix, Probe, WeightChangedError
from sculpt.task.originals import Originals
from sculpt.task.targets import Target


class RunningTask:
    """What trains, and what sees to it that the weights follow.

    Args:
        targets, found: what is trained, and the bases of each.
        weights: those before the task by name, where it has begun already.

    Attributes:
        matrices: by name.
        others: parameters that train outside of the guarantee, by name.
        flags: `requires_grad` of all parameters before the task.
        seeds: of the next update of each matrix. A seed is used once: by one matrix in one update
            of one task.
        skipped_steps: steps that were left out, their gradients not being finite.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SculptConfig,
        targets: Sequence[Target],
        found: Sequence[Bases],
        name: str | None,
        group: ProcessGroup | None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.config, self.name = model, config, name
        self.id = uuid.uuid4().hex
        self.skipped_steps = 0
        weights = weights or {target.name: target.parameter for target in targets}
        self.originals = Originals(config)
        originals = [self.originals.keep(target, weights[target.name]) for target in targets]
        self.flags = {p: p.requires_grad for p in model.parameters()}
        self.others = freeze(model, targets, config)
        if config.chosen_engine == "gradient":
            warn_that_gradients_leak()
        self._sharded = sharded_modules(model)
        self.processes = Processes(group, device_of(targets[0].parameter))
        self._modules = TrainedModules(model, {p.path: p.module for t in targets for p in t.places})
        self.matrices = {
            target.name: make_matrix(target, bases, original, config)
            for target, bases, original in zip(targets, found, originals, strict=True)
        }
        # What several processes find out by themselves they would have to agree on, in every step.
        self._probe = Probe([] if self._sharded else self.matrices.values())
        self._guard = OptimizerGuard(self.matrices.values())
        self._attached: Attachment | None = None
        for matrix in self.matrices.values():
            matrix.call_on_change(self._keep_current)
        device = targets[0].parameter.device
        self.seeds = config.seed + torch.arange(len(self.matrices), device=device) * 2**20

    def hold(self, undo: Callable[[], None]) -> None:
        """Let the model refuse to move; `undo` is what `sculpt.abandon` calls."""
        hold(self.model, [matrix.trained for matrix in self.matrices.values()], undo)

    def checked(self) -> dict[str, Matrix]:
        """The matrices, where everything is in its place.

        Raises:
            RuntimeError: a module or a weight was replaced or moved.
        """
        reshard(self._sharded)
        self._modules.check()
        for matrix in self.matrices.values():
            matrix.check_in_place()
            matrix.check_weight()
        return self.matrices

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and what trains: coordinates by module name, then other parameters by theirs."""
        for name, matrix in self.checked().items():
            yield name, matrix.trained
        yield from self.others.items()

    def attach(self, optimizer: Optimizer) -> None:
        """See `Sculptor.attach`."""
        if self._attached is not None:
            raise RuntimeError("an optimizer is attached already; one task takes one optimizer")
        matrices = self.checked().values()
        optimizer = innermost(optimizer)
        check_holds(optimizer, matrices)
        mark = int(self.id[:15], 16)
        check_task({"param_groups": optimizer.param_groups}, mark, loaded=False)
        mark_task(optimizer, {id(matrix.trained) for matrix in matrices}, mark)
        for matrix in matrices:
            matrix.attached()
        self._guard.follow(optimizer)
        self._attached = Attachment(
            optimizer,
            self._before_step, self._follow, self._skipped, self._before_first, self._gradients,
            task=mark, skip_nonfinite=self.config.skip_nonfinite, processes=self.processes,
        )  # fmt: skip

    def is_attached(self, optimizer: Optimizer) -> bool:
        return self._attached is not None and self._attached.optimizer is innermost(optimizer)

    def _skipped(self) -> int:
        self.skipped_steps += 1
        return self.skipped_steps

    def _before_first(self, optimizer: Optimizer) -> None:
        check_holds(optimizer, self.checked().values())
        check_replicas(self.processes, dict(self.named_parameters()))

    def _gradients(self) -> None:
        """Say which matrices have none."""
        without = [name for name, matrix in self.matrices.items() if matrix.trained.grad is None]
        if without:
            warnings.warn(
                f"no gradient reached {len(without)} of {len(self.matrices)} matrices in the first "
                f"step, so it does not train them: {some(without)}. Their layers did not run, or "
                "something computes with weights that it took from them before begin_task()",
                SculptWarning,
                stacklevel=6,
            )

    def _before_step(self, captured: bool) -> None:
        self._modules.check()
        if not captured:
            self._settle()

    @torch.no_grad()
    def _settle(self, *, thorough: bool = False, refuse: bool = True) -> str | None:
        """Take up what others have written into weights or coordinates since the last step.

        Args:
            thorough: look at all values, not only where a version or the probe tells.
            refuse: raise for changes that the task cannot have made; otherwise leave them.

        Returns:
            The name of a matrix whose weight must follow its coordinates.
        """
        matrices = list(self.matrices.values())
        written = self._probe.differs() or [False] * len(matrices)
        touched = [matrix.is_touched() for matrix in matrices]
        moved = None
        for matrix, was_written, look in zip(matrices, written, touched, strict=True):
            if was_written or look or thorough:
                try:
                    follows = not matrix.settle(was_written, thorough)
                    moved = moved if follows else moved or matrix.name
                except WeightChangedError:
                    if refuse:
                        raise
        if moved is None and any(written):
            self._probe.note()
        return moved

    def _keep_current(self) -> None:
        """Before a forward with coordinates or weights that others may have changed."""
        with torch.inference_mode(False), torch.no_grad():
            if self._sharded:  # Gathered for this forward: they cannot follow now.
                for matrix in self.matrices.values():
                    if matrix.lacks_a_step():
                        raise RuntimeError(not_followed(matrix.name))
                    matrix.trust()
                return
            moved = self._settle()
            if moved is not None:
                if not self._guard.driven:
                    raise RuntimeError(not_followed(moved))
                self._follow()

    def update_weights(self) -> None:
        """See `Sculptor.update_weights`."""
        self._guard.driven = True
        self._follow()

    @torch.no_grad()
    def _follow(self) -> None:
        matrices = list(self.checked().values())
        try:
            follow_all(matrices, self.seeds)
        finally:
            self._probe.note()
        self.seeds += len(matrices) * 2**20

    def settle(self, *, refuse: bool) -> None:
        """Let weights and coordinates belong together, whatever others have written to them.

        Raises:
            WeightChangedError: where `refuse`, and the task cannot have made such a change.
        """
        if self._settle(thorough=True, refuse=refuse) is not None:
            self._follow()

    def note(self) -> None:
        """Weights are as they should be, however they became so."""
        self._probe.note()

    def refuse_idle_steps(self) -> None:
        """Raise `RuntimeError` where there were steps, and none has changed anything."""
        steps = 0 if self._attached is None else self._attached.steps
        changed = any(matrix.has_changed() for matrix in self.matrices.values())
        if steps and not self.processes.any(changed):
            raise RuntimeError(
                f"none of the {steps} steps of this task has changed a weight; "
                f"{self.skipped_steps} were left out, their gradients not being finite. Are all "
                "labels masked, or does the loss not depend on what trains?"
            )

    @torch.no_grad()
    def leave(self, *, undo: bool = False) -> None:
        """Fold what was learned, or put the weights before the task back; the model is plain."""
        reshard(self._sharded)
        for matrix in self.matrices.values():
            matrix.end(undo=undo)
        if self._attached is not None:
            self._attached.end()
        self._guard.remove()
        release(self.model)
        for parameter, flag in self.flags.items():
            parameter.requires_grad_(flag)
        self.originals.close()
