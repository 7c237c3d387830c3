"""One pass over rows: sums `Σ x xᵀ` of what layers read, `Σ g gᵀ` of gradients at their outputs.

`g` is the gradient of a row's summed log-likelihood, so that rows may come in any batches. Each sum
is made where its vectors appear: nothing of a batch is alive after it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import astuple
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sculpt.adaptive.batches import Run, in_step, loss_of, runs
from sculpt.config import SculptConfig
from sculpt.curvature.factors import Diagonal, Factor, bytes_of, empty
from sculpt.curvature.memory import Memory, Sides
from sculpt.curvature.products import Products
from sculpt.distributed.processes import Processes
from sculpt.distributed.sharding import reshard, sharded_modules
from sculpt.memory import free_bytes
from sculpt.task.targets import Place, Target
from sculpt_kernels import is_divided

IGNORED = -100
"""Labels of tokens that are not learned, as in torch and transformers."""


def collect(
    model: nn.Module,
    targets: Sequence[Target],
    batches: Any,
    known: Memory,
    config: SculptConfig,
    processes: Processes,
    name: str = "",
) -> Memory:
    """The factors of all targets over `batches`; those of a model during no task.

    Args:
        batches: see `sculpt.adaptive.batches.runs`; each gives the mean loss of its rows with their
            labels, or is a function that returns the summed loss of its rows, and whose `len` is
            their number. In several processes each has its own, and all get the sums over them.
        known: what is protected already: its factors decide of which kind these are.
        name: under which the rows are counted.

    Raises:
        TypeError, ValueError: the data cannot be used, values in the model are not finite, or the
            factors do not fit `config.factor_bytes`.
    """
    kinds = processes.tell(choose_kinds(targets, config, known, processes.device))[0]
    made = Pass(targets, kinds, config.sketch_rank)
    rows = 0
    error: Exception | None = None
    try:
        given = runs(batches, processes.device)
        if any(is_divided(target.parameter) for target in targets):
            given = in_step(given, processes)
        with made.on(model):
            for run in given:
                rows += made.batch(run, model)
        for key, factor in made.memory.factors.items():
            if not bool(torch.isfinite(factor.total).all()):
                raise ValueError(f"values at {key.rpartition('.')[0]!r} are not finite")
    except (TypeError, ValueError) as problem:
        error = problem
    finally:
        reshard(sharded_modules(model))
    processes.fail_together(error)
    memory = made.memory
    memory.rows = {name: sum(processes.tell(rows))}
    _sum(made, targets, processes)
    return memory


def choose_kinds(
    targets: Sequence[Target], config: SculptConfig, known: Memory, device: torch.device
) -> dict[str, str]:
    """Of which kind each factor is: whole ones as long as they fit, the longest sides sketched.

    Raises:
        ValueError: they do not fit `config.factor_bytes`.
    """
    kinds = {key: factor.kind for key, factor in known.factors.items()}
    shapes = {key: shape for key, shape in _shapes(targets).items() if key not in kinds}
    looked_up = {
        f"{target.name}.left"
        for target in targets
        if any(isinstance(place.module, nn.Embedding) for place in target.places)
    }
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
    for sides in processes.tell({name: astuple(keys) for name, keys in memory.sides.items()}):
        memory.sides |= {name: Sides(*keys) for name, keys in sides.items()}
    keys = {key for found in processes.tell(list(memory.factors)) for key in found}
    for target in targets:
        for side in ("left", "right"):
            if f"{target.name}.{side}" in keys:
                for tensor in made.factor(target, side).tensors().values():
                    dist.all_reduce(tensor, group=processes.group)


class Pass:
    """What is collected from a model while `batch` runs.

    Args:
        targets: whose factors are wanted.
        kinds: of which kind each is, by key.
        width: columns of a sketch.
    """

    def __init__(self, targets: Sequence[Target], kinds: Mapping[str, str], width: int) -> None:
        self.memory = Memory()
        self._targets = {target.name: target for target in targets}
        self._kinds, self._width = kinds, width
        self._masks: list[Tensor] = []
        self._backward = False
        self._read: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Hooks on all targets of a model, which is left as it was."""
        modes = {module: module.training for module in model.modules()}
        flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
        model.eval()
        model.requires_grad_(False)
        try:
            with ExitStack() as stack:
                handle = model.register_forward_pre_hook(self._note_masks, with_kwargs=True)
                stack.callback(handle.remove)
                stack.enter_context(_one_by_one(model))
                inside: dict[nn.Module, dict[str, str]] = {}
                for target in self._targets.values():
                    for place in target.places:
                        hook = self._hook(target, place)
                        if hook is None:
                            inside.setdefault(place.module, {})[place.parameter] = target.name
                        else:
                            stack.callback(place.module.register_forward_hook(hook).remove)
                for module, parameters in inside.items():
                    self._watch(stack, module, parameters)
                yield
        finally:
            self._read.clear()
            for module, mode in modes.items():
                module.training = mode
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)

    def batch(self, run: Run, model: nn.Module) -> int:
        """Pass one batch; the number of rows in it.

        Raises:
            ValueError: it gives no loss, or none that is finite.
        """
        with torch.enable_grad():
            output = run.call(model)
            loss = loss_of(output)
            if loss is None:
                raise ValueError(
                    "what is protected needs a loss: batches with labels for a model that computes "
                    "one, or functions of the model that return the summed loss of their rows"
                )
            if not bool(torch.isfinite(loss.detach())):
                raise ValueError(f"a batch gives a loss that is not finite, {float(loss.detach())}")
            rows, learned = _size_of(run, output)
            self._read.clear()
            self._backward = True
            try:
                if loss.requires_grad:
                    torch.autograd.backward(loss * learned)
            finally:
                self._backward = False
        return rows

    def _hook(self, target: Target, place: Place) -> Callable[..., Any] | None:
        if isinstance(place.module, nn.Embedding):
            return self._embedding_hook(target)
        if isinstance(place.module, nn.Linear) or place.transposed:
            return self._linear_hook(target)
        return None

    def _watch(self, stack: ExitStack, module: nn.Module, parameters: dict[str, str]) -> None:
        """See the products inside of a module."""
        mode = Products(module, parameters, self._product)
        before = module.register_forward_pre_hook(lambda *_: _enter(mode))
        after = module.register_forward_hook(lambda *_: _leave(mode), always_call=True)
        stack.callback(before.remove)
        stack.callback(after.remove)

    def _product(
        self, name: str, x: Tensor, product: Tensor, at: int | None, last: bool
    ) -> Tensor | None:
        target = self._targets[name]
        self.memory.sides[name] = Sides(f"{name}.left", f"{name}.right", reads_left=not last)
        reads, writes = ("right", "left") if last else ("left", "right")

        def add(side: str, vectors: Tensor) -> None:
            factor = self.factor(target, side)
            if at is not None or factor.count.ndim == 0:
                factor.add(vectors.flatten(0, -2), at)
            else:
                for member, own in enumerate(vectors):
                    factor.add(own, member)

        if not self._backward:
            add(reads, x.detach())
        return self._listen(product, lambda g: add(writes, g))

    def _linear_hook(self, target: Target) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            x = args[0]
            if not self._backward:  # Recomputed layers have been seen.
                sides = self.memory.sides.get(target.name)
                if sides is None:
                    key = self._owner(x, target.name)
                    sides = Sides(f"{target.name}.left", key)
                    self.memory.sides[target.name] = sides
                if sides.right == f"{target.name}.right":
                    self.factor(target, "right").add(self._kept(x.detach()))
            return self._listen(output, lambda g: self.factor(target, "left").add(g.flatten(0, -2)))

        return hook

    def _owner(self, x: Tensor, name: str) -> str:
        """The key of the factor of `x`; layers that read the very same tensor share one."""
        known = self._read.get(id(x))
        if known is not None and known[0]() is x:
            return known[1]
        self._read[id(x)] = (weakref.ref(x), f"{name}.right")
        return f"{name}.right"

    def _embedding_hook(self, target: Target) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not self._backward:
                sides = Sides(f"{target.name}.left", f"{target.name}.right", reads_left=True)
                self.memory.sides[target.name] = sides
                left = self.factor(target, "left")
                assert isinstance(left, Diagonal)
                left.add_indices(self._kept(args[0][..., None]))
            return self._listen(
                output, lambda g: self.factor(target, "right").add(g.flatten(0, -2))
            )

        return hook

    def _listen(self, output: Tensor, take: Callable[[Tensor], None]) -> Tensor | None:
        """Call `take` with the gradient at the output of a layer."""
        if not torch.is_grad_enabled():
            return None
        given = output
        if not output.requires_grad:
            output = output.requires_grad_().clone()
        output.register_hook(lambda g: take(g.detach()))  # type: ignore[no-untyped-call]
        return None if output is given else output

    def factor(self, target: Target, side: str) -> Factor:
        """The factor of one side of a target, empty where there is none yet."""
        key = f"{target.name}.{side}"
        factor = self.memory.factors.get(key)
        if factor is None:
            *stack, m, n = target.shape
            shape = (*stack, m if side == "left" else n)
            device = target.parameter.device
            factor = empty(self._kinds[key], shape, device, self._width)
            self.memory.factors[key] = factor
        return factor

    def _note_masks(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        names = ("attention_mask", "decoder_attention_mask")
        masks = [kwargs.get(name) for name in names]
        labels = kwargs.get("labels")
        self._masks = [m.bool() for m in masks if isinstance(m, Tensor) and m.ndim == 2]
        if isinstance(labels, Tensor) and labels.ndim == 2:
            self._masks.append(labels != IGNORED)

    def _kept(self, x: Tensor) -> Tensor:
        """`(N, size)`: the vectors of all positions that are no padding."""
        for mask in self._masks:
            if mask.shape == x.shape[:-1]:
                return x[mask.to(x.device)]
        return x.flatten(0, -2)


def _enter(mode: Any) -> None:
    mode.__enter__()


def _leave(mode: Any) -> None:
    mode.__exit__(None, None, None)


@contextmanager
def _one_by_one(model: nn.Module) -> Iterator[None]:
    """Let mixtures of experts of transformers multiply by one expert after the other."""
    name = "_experts_implementation"
    configs = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), name)}
    before = [(config, getattr(config, name)) for config in configs.values()]
    for config, _ in before:
        setattr(config, name, "eager")
    try:
        yield
    finally:
        for config, value in before:
            setattr(config, name, value)


def _size_of(run: Run, output: Any) -> tuple[int, int]:
    """Rows of a batch, and by what its mean loss is to be multiplied to be summed."""
    inputs = run.inputs
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor):
        return (len(run.call) if isinstance(run.call, Sized) else 1), 1
    predicts = getattr(output, "logits", labels).ndim == 3
    encoded = hasattr(output, "encoder_last_hidden_state")
    learned = labels[..., 1:] if predicts and not encoded else labels
    return len(labels), int((learned != IGNORED).sum())
