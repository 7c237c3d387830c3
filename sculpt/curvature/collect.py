"""One pass over rows: sums `Σ x xᵀ` of what layers read, `Σ g gᵀ` of gradients at their outputs.

`g` is the gradient of a row's summed log-likelihood, so that rows may come in any batches. Each sum
is made where its vectors appear: nothing of a batch is alive after it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from sculpt.adaptive.batches import Run, in_step, loss_of, runs
from sculpt.config import SculptConfig
from sculpt.curvature.factors import Diagonal, Factor, bytes_of, empty
from sculpt.curvature.memory import Memory, Sides
from sculpt.curvature.modes import unchanged
from sculpt.curvature.padding import IGNORED, Padding, encodes_apart
from sculpt.curvature.products import Products, Use
from sculpt.distributed.processes import Processes
from sculpt.distributed.sharding import reshard, sharded_modules
from sculpt.memory import free_bytes
from sculpt.task.targets import Target
from sculpt_kernels import is_divided

WITHOUT_LOSS = (
    "what is protected needs a loss: batches with labels for a model that computes one, or "
    "functions of the model that return the summed loss of their rows"
)


def collect(
    model: nn.Module,
    targets: Sequence[Target],
    batches: Any,
    known: Memory,
    config: SculptConfig,
    processes: Processes,
    name: str = "",
    argument: str = "batches",
) -> Memory:
    """The factors of all targets over `batches`; those of a model during no task.

    Args:
        batches: see `sculpt.adaptive.batches.runs`; each gives the mean loss of its rows with their
            labels, or is a function that returns the summed loss of its rows, and whose `len` is
            their number. In several processes each has its own, and all get the sums over them.
        known: what is protected already: its factors decide of which kind these are.
        name: under which the rows are counted.
        argument: what errors call the batches.

    Raises:
        TypeError, ValueError: the data cannot be used, values in the model are not finite, or the
            factors do not fit `config.factor_bytes`.
        RuntimeError: it is called in inference mode.
    """
    _refuse_inference()
    kinds: dict[str, str] = {}
    error: Exception | None = None
    try:
        kinds = choose_kinds(targets, config, known, processes.device)
    except ValueError as problem:
        error = problem
    processes.fail_together(error)
    kinds = processes.tell(kinds)[0]
    made = Pass(targets, kinds, known, config.sketch_rank)
    divided = any(is_divided(target.parameter) for target in targets)
    rows = 0
    try:
        given = runs(batches, processes.device, argument)
        if divided:
            given = in_step(given, processes, argument)
        with made.on(model):
            for run in given:
                # Where weights are divided, all go on to the backward pass or none.
                rows += made.batch(run, model, processes if divided else processes.alone())
        for key, factor in made.memory.factors.items():
            if not bool(torch.isfinite(factor.total).all()):
                raise ValueError(f"values at {key.rpartition('.')[0]!r} are not finite")
    except ElsewhereError:
        pass
    except (TypeError, ValueError) as problem:
        error = problem
    finally:
        reshard(sharded_modules(model))
    processes.fail_together(error)
    memory = made.memory
    memory.rows = {name: sum(processes.tell(rows))}
    _sum(made, targets, processes)
    return memory


def checked(batches: Any, processes: Processes) -> Any:
    """The same batches, of which is known that they can be passed, as far as it shows before.

    Raises:
        TypeError, ValueError: as `collect`.
        RuntimeError: those of another process cannot be used, or gradients are off for good.
    """
    _refuse_inference()
    error: Exception | None = None
    try:
        batches = list(batches) if isinstance(batches, Iterator) else batches
        for run in runs(batches, processes.device, "batches"):
            if not _has_loss(run):
                raise ValueError(WITHOUT_LOSS)
    except (TypeError, ValueError) as problem:
        error = problem
    processes.fail_together(error)
    return batches


def _refuse_inference() -> None:
    if torch.is_inference_mode_enabled():
        raise RuntimeError("what is protected needs gradients; call this outside of inference_mode")


def choose_kinds(
    targets: Sequence[Target], config: SculptConfig, known: Memory, device: torch.device
) -> dict[str, str]:
    """Of which kind each factor is: whole ones as long as they fit, the longest sides sketched.

    Raises:
        ValueError: they do not fit `config.factor_bytes`.
    """
    kinds = {key: factor.kind for key, factor in known.factors.items()}
    shapes = {key: shape for key, shape in _shapes(targets).items() if key not in kinds}
    looked_up = {f"{target.name}.left" for target in targets if _looked_up(target)}
    kinds |= {key: "diagonal" if key in looked_up else "full" for key in shapes}
    limit = config.factor_bytes
    if limit is None:
        free = free_bytes(device)
        limit = None if free is None else free // 4
    width = config.sketch_rank

    def needed() -> int:
        return sum(bytes_of(kinds[key], shape, width) for key, shape in shapes.items())

    for key in sorted(shapes, key=lambda key: -shapes[key][-1]):
        if limit is None or needed() <= limit:
            return kinds
        if kinds[key] == "full" and shapes[key][-1] > width:
            kinds[key] = "sketch"
    if limit is not None and needed() > limit:
        raise ValueError(
            f"factor_bytes={config.factor_bytes}: the factors of {len(targets)} targets take "
            f"{needed():,} bytes as sketches of rank {width}, and {limit:,} may be used; take a "
            "smaller sketch_rank or fewer targets"
        )
    return kinds


def bytes_of_all(targets: Sequence[Target], config: SculptConfig, device: torch.device) -> int:
    """Memory of the factors of all targets, at most: layers that read the same input share one.

    Raises:
        ValueError: they do not fit `config.factor_bytes`.
    """
    kinds = choose_kinds(targets, config, Memory(), device)
    shapes = _shapes(targets)
    return sum(bytes_of(kinds[key], shape, config.sketch_rank) for key, shape in shapes.items())


def _shapes(targets: Sequence[Target]) -> dict[str, tuple[int, ...]]:
    """`(..., size)` of each factor by its key."""
    found = {}
    for target in targets:
        *stack, m, n = target.shape
        found[f"{target.name}.left"] = (*stack, m)
        found[f"{target.name}.right"] = (*stack, n)
    return found


def _sum(made: Pass, targets: Sequence[Target], processes: Processes) -> None:
    """Add the sums of all processes, on each of them."""
    if processes.size == 1:
        return
    memory = made.memory
    said = [
        {name: Sides(*keys) for name, keys in sides.items()}
        for sides in processes.tell({name: astuple(keys) for name, keys in memory.sides.items()})
    ]
    for name in {name for sides in said for name in sides}:
        if len({sides[name].right for sides in said if name in sides}) > 1:
            memory.separate(name)
            for sides in said:
                if name in sides:
                    sides[name] = replace(sides[name], right=f"{name}.right")
    for sides in said:
        memory.add_sides(sides)
    keys = {key for found in processes.tell(list(memory.factors)) for key in found}
    for target in targets:
        for side in ("left", "right"):
            if f"{target.name}.{side}" in keys:
                for tensor in made.factor(target, side).tensors().values():
                    dist.all_reduce(tensor, group=processes.group)


class ElsewhereError(Exception):
    """Another process has failed; `Processes.fail_together` tells of it."""


class Pass:
    """What is collected from a model while `batch` runs.

    Args:
        targets: whose factors are wanted.
        kinds: of which kind each is, by key.
        known: what is protected already: sketches get as many columns as there.
        width: columns of other sketches.
    """

    def __init__(
        self, targets: Sequence[Target], kinds: Mapping[str, str], known: Memory, width: int
    ) -> None:
        self.memory = Memory()
        self._targets = targets
        self._kinds, self._known, self._width = kinds, known, width
        self._alone = {t.name for t in targets if len(t.shape) > 2 or _looked_up(t)}
        self._backward = False
        self._read: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._padding = Padding()

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """See what a model does with all targets; it is left as it was."""
        with ExitStack() as stack:
            stack.callback(self._read.clear)
            stack.enter_context(unchanged(model))
            stack.enter_context(self._padding.on(model))
            stack.enter_context(Products(self._targets, self._use, self._padding.gather))
            yield

    def batch(self, run: Run, model: nn.Module, together: Processes) -> int:
        """Pass one batch; the number of rows in it.

        Raises:
            ValueError: it gives no loss, or none that is finite.
            ElsewhereError: that is so in another one of the processes that go on together.
        """
        with torch.enable_grad():
            self._read.clear()
            self._padding.clear()
            output = run.call(model)
            loss = loss_of(output)
            error = _why_not(run, loss)
            said = together.tell(error)
            if error is not None:
                raise ValueError(error)
            if any(said):
                raise ElsewhereError
            assert loss is not None
            rows, learned = _size_of(run, model, output)
            self._backward = True
            try:
                if loss.requires_grad:
                    # By its edge: a backward pass from a tensor would not see what recomputes.
                    edge = get_gradient_edge(loss)
                    torch.autograd.backward([edge], [torch.full_like(loss, learned)])
            finally:
                self._backward = False
        return rows

    def _use(self, use: Use, result: Tensor) -> Tensor:
        """Add what a weight reads, and have what comes out say its gradient."""
        reads, writes = ("left", "right") if use.turned else ("right", "left")
        read = list(self._vectors(use, use.x.detach()))
        kept = [self._padding.kept(use.x, x.shape[:-1]) for _, x in read]
        if not self._backward and self._owns(use.target.name, reads, use.x):
            factor = self.factor(use.target, reads)
            for (at, x), mask in zip(read, kept, strict=True):
                own = x if mask is None else x[mask]
                if x.is_floating_point():
                    factor.add(own.reshape(-1, own.shape[-1]), at)
                else:
                    assert isinstance(factor, Diagonal)
                    factor.add_indices(own)
        if not torch.is_grad_enabled():
            return result
        counts = [
            x.shape[:-1].numel() if mask is None else int(mask.sum())
            for (_, x), mask in zip(read, kept, strict=True)
        ]

        def take(g: Tensor) -> None:
            factor = self.factor(use.target, writes)
            for (at, own), count in zip(self._vectors(use, g.detach()), counts, strict=True):
                factor.add(own.reshape(-1, own.shape[-1]), at, count)

        listen: Any = result.requires_grad_().register_hook  # Without types in torch.
        listen(take)
        # What is a view loses its hooks where it is written to.
        return result.clone()

    def _vectors(self, use: Use, x: Tensor) -> Iterator[tuple[int | None, Tensor]]:
        """Those `(..., size)` of each member of a stack, with its number."""
        if not x.is_floating_point():
            x = x[..., None]
        elif use.columns:
            x = x.mT
        if len(use.target.shape) == 2 or use.at is not None:
            yield use.at, x
        else:
            yield from enumerate(x)

    def _owns(self, name: str, reads: str, x: Tensor) -> bool:
        """Whether a target keeps the factor of its inputs, and does not share that of another.

        Layers that read the very same tensor share one.

        Raises:
            ValueError: it shares one in other rows.
        """
        own, key = f"{name}.right", f"{name}.right"
        if reads == "right" and name not in self._alone:
            read = self._read.get(id(x))
            if read is not None and read[0]() is x:
                key = read[1]
            else:
                self._read[id(x)] = weakref.ref(x), own
        self.memory.add_sides({name: Sides(f"{name}.left", key, reads)})
        shared = self.memory.sides[name].right
        if shared != own and shared != key:
            raise ValueError(
                f"{name!r} reads what {shared.rpartition('.')[0]!r} reads in some rows, and "
                "something else in others: protect them by calls of their own"
            )
        return shared == own

    def factor(self, target: Target, side: str) -> Factor:
        """The factor of one side of a target, empty where there is none yet."""
        key = f"{target.name}.{side}"
        factor = self.memory.factors.get(key)
        if factor is None:
            *stack, m, n = target.shape
            shape = (*stack, m if side == "left" else n)
            known = self._known.factors.get(key)
            width = self._width if known is None else known.total.shape[-1]
            factor = empty(self._kinds[key], shape, target.parameter.device, width)
            self.memory.factors[key] = factor
        return factor


def _looked_up(target: Target) -> bool:
    return any(isinstance(place.module, nn.Embedding) for place in target.places)


def _has_loss(run: Run) -> bool:
    return run.own or isinstance(run.inputs.get("labels"), Tensor)


def _why_not(run: Run, loss: Tensor | None) -> str | None:
    """Why nothing can be learned of a batch."""
    if loss is None or not _has_loss(run):
        return WITHOUT_LOSS
    if not bool(torch.isfinite(loss.detach())):
        return f"a batch gives a loss that is not finite, {float(loss.detach())}"
    return None


def _size_of(run: Run, model: nn.Module, output: Any) -> tuple[int, int]:
    """Rows of a batch, and by what its mean loss is to be multiplied to be summed."""
    labels = run.inputs.get("labels")
    if run.own or not isinstance(labels, Tensor):
        return (len(run.call) if isinstance(run.call, Sized) else 1), 1
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = output[1] if isinstance(output, tuple) else labels
    own = getattr(model, "loss_type", None) in ("ForMaskedLM", "ForTokenClassification")
    # Of a causal model each token predicts the next one.
    shifted = logits.ndim == 3 and not own and not any(map(encodes_apart, model.modules()))
    learned = labels[..., 1:] if shifted else labels
    return len(labels), int((learned != IGNORED).sum())
